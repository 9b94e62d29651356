"""MiniLM on SST-2, MNLI (10,000 pairs) and RTE: from banks of features, and inside the backbone.

python scripts/bench_text.py [--data ../shared/data]

Every head reads the mean of a text's tokens, but for the two rows named CLS. Rates are chosen on validation (SST-2's
own dev sentences; elsewhere a fifth of the training pairs) where there are several; each method is tested once, at its
last epoch. Killed, it goes on where it was. Writes docs/results/text.jsonl and .md.
"""

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_vit_tiny import commit

from restuning.adapt import adapt
from restuning.backbones import MINILM, load_backbone, reading_of
from restuning.bank import Bank, FromFeatures
from restuning.bank.store import MANIFEST
from restuning.data import load_task, prepared
from restuning.evaluate import loader
from restuning.measure import saved_bytes
from restuning.recipe import TrainConfig
from restuning.run import RESULT, RUN, Run, build_bank, execute

BATCH, MAX_LENGTH = 32, 128


@dataclass(frozen=True)
class Row:
    """A method: on which tokens its bank is, or None inside the backbone; the rates tried."""

    method: str
    pool: str
    bank: str | None
    rates: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"{self.method} (CLS)" if self.pool == "cls" else self.method


HEADS = (0.005, 0.001, 0.0003)
ROWS = [
    Row("linear", "mean", "mean", HEADS),
    Row("bypass-mean", "mean", "mean", HEADS),
    Row("linear", "cls", "first", HEADS),
    Row("bypass", "cls", "first", HEADS),
    Row("res-tuning", "mean", None, (0.001,)),
    Row("full", "mean", None, (0.00005,)),
    Row("lora", "mean", None, (0.001,)),
]
TASKS = {"SST-2": "SST-2", "RTE": "RTE", "MNLI_10k": "MNLI_10k"}
EPOCHS = {"SST-2": (10, 2), "RTE": (30, 5), "MNLI_10k": (20, 3)}  # from a bank, inside the backbone
SEEDS = (0, 1, 2)  # from a bank; inside the backbone the first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/text"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    args = parser.parse_args()
    for task in args.tasks:
        spec = f"text:{args.data}/text/{TASKS[task]}"
        for tokens in ("mean", "first"):
            bank(spec, args.out / f"bank-{task}-{tokens}", tokens)
        for row in ROWS:
            for seed in SEEDS if row.bank else SEEDS[:1]:
                one(args, task, spec, row, seed)
                record(args)


def bank(spec: str, out: Path, tokens: str) -> None:
    if not (out / MANIFEST).exists():
        how = {"tokens": tokens, "dtype": "float16", "max_length": MAX_LENGTH, "sizes": {}}
        build_bank(spec, out, backbone=MINILM, resume=out.exists(), progress=False, **how)


def one(args: argparse.Namespace, task: str, spec: str, row: Row, seed: int) -> None:
    out = args.out / f"{task}-{row.method}-{row.pool}-{seed}"
    if (out / RESULT).exists():
        return
    at = args.out / f"bank-{task}-{row.bank}"
    epochs = EPOCHS[task][0 if row.bank else 1]
    run = Run(
        data=spec,
        backbone=MINILM,
        method=row.method,
        bank=str(at) if row.bank else None,
        pool=None if row.method == "bypass-mean" else row.pool,
        max_length=MAX_LENGTH,
        lrs=row.rates,
        training=TrainConfig(epochs=epochs, batch_size=BATCH, seed=seed, group_by_length=row.bank is None),
    )
    result = execute(run, out, resume=(out / RUN).exists())
    more = {"saved_bytes": kept_for_backward(run), "commit": commit()}
    (out / RESULT).write_text(json.dumps({**result, **more}, indent=2) + "\n")
    print(f"{task}, {row.name}, seed {seed}: {result['test_accuracy']:.2f} % at lr {result['lr']}", flush=True)


def kept_for_backward(run: Run) -> int:
    """Bytes that autograd keeps for one batch: the first training texts that the run reads."""
    if run.bank is not None:
        opened = Bank(run.bank, verify=False)
        tuned = adapt(load_backbone(run.backbone), run.spec, 2, pool=run.pool).train()
        features = opened.rows("train").fetch(range(BATCH))[0]
        model = FromFeatures(tuned, opened.view, opened.layers)
        return saved_bytes(lambda: model(features), tuned.parameters())
    backbone = load_backbone(run.backbone)
    task = load_task(run.data)
    how = reading_of(backbone, max_length=run.max_length)
    inputs, _ = next(iter(loader(prepared(task.train, how), BATCH)))
    tuned = adapt(backbone, run.spec, 2, pool=run.pool).train()
    with torch.enable_grad():
        return saved_bytes(lambda: tuned(inputs), tuned.parameters())


def record(args: argparse.Namespace) -> None:
    """Both files, from what is done so far."""
    rows = []
    for task in TASKS:
        for row in ROWS:
            for seed in SEEDS:
                done = args.out / f"{task}-{row.method}-{row.pool}-{seed}" / RESULT
                if done.exists() and "commit" in (found := json.loads(done.read_text())):
                    rows.append({"task": task, "row": row.name, "seed": seed, **found})
    args.results.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({k: v for k, v in r.items() if k != "epochs"} | {"epoch_seconds": seconds(r)}) for r in rows]
    (args.results / "text.jsonl").write_text("\n".join(lines) + "\n")
    table = []
    for task in TASKS:
        mine = [r for r in rows if r["task"] == task]
        if not mine:
            continue
        table += [
            f"## {task}",
            "",
            "| method | reads | test accuracy | seeds | epochs | rate | trained | kept, MiB | seconds an epoch |",
            "|---|---|--:|--:|--:|---|--:|--:|--:|",
        ]
        for row in ROWS:
            same = [r for r in mine if r["row"] == row.name]
            if not same:
                continue
            found = [r["test_accuracy"] for r in same]
            spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            first = same[0]
            cells = [
                row.name,
                f"a bank, {row.bank if row.bank == 'mean' else 'CLS'}" if row.bank else "texts",
                f"{statistics.fmean(found):.2f}{spread}",
                str(len(found)),
                str(len(first["epochs"])),
                ", ".join(sorted({f"{r['lr']:g}" for r in same})),
                f"{first['parameters']['trainable']:,}",
                f"{first['saved_bytes'] / 2**20:.2f}",
                f"{statistics.median([seconds(r) for r in same]):.1f}",
            ]
            table.append(f"| {' | '.join(cells)} |")
        table.append("")
    first = rows[0]
    text = f"""# MiniLM on SST-2, MNLI and RTE

{MINILM} (6 blocks, width 384). SST-2: 67,349 sentences, tested on the 1,821 labelled ones; MNLI_10k:
8,999 pairs, tested on 1,000; RTE: 2,490 pairs, tested on 277. Texts cut to {MAX_LENGTH} tokens, batch {BATCH}, weight
decay 0.05, the last epoch. Every head reads the mean of a text's tokens (`bypass-mean` runs on that mean alone), but
for the rows named CLS. Banks hold float16. Where a method has several rates ({", ".join(map(str, HEADS))}),
validation chose: SST-2's own dev sentences, elsewhere a fifth of the training pairs. Bytes kept for backward: of one
batch, the first {BATCH} training texts.

{chr(10).join(table)}
Command: `python scripts/bench_text.py`; commit {first["commit"]}; torch {first["versions"]["torch"]}, CPU,
{torch.get_num_threads()} thread(s), other work beside it. Every figure with its settings: `text.jsonl`.
"""
    (args.results / "text.md").write_text(text)


def seconds(result: dict) -> float:
    return statistics.median(e["seconds"] for e in result["epochs"]) if "epochs" in result else result["epoch_seconds"]


if __name__ == "__main__":
    main()

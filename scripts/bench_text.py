"""MiniLM on SST-2, MNLI (10,000 pairs) and RTE: from banks of features, and inside the backbone.

python scripts/bench_text.py [--data ../shared/data]

Every head reads the mean of a text's tokens, but for the two rows named CLS. Rates are chosen on validation (SST-2's
own dev sentences; elsewhere a fifth of the training pairs) where there are several; each method is tested once, at its
last epoch. Killed, it goes on where it was. Writes docs/results/text.jsonl and .md.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from bench_vit_tiny import commit
from torch import nn

from restuning.backbones.load import MINILM, load_backbone, reading_of
from restuning.data import load_task, prepared
from restuning.features.bank import Bank, FromBank, FromFeatures
from restuning.features.bank.format import MANIFEST
from restuning.model.tuned import adapt
from restuning.runs.banks import build_bank
from restuning.runs.run import execute
from restuning.runs.settings import RESULT, RUN, Run
from restuning.runs.sweep import Sweep, sweep
from restuning.training.config import TrainConfig, data_order
from restuning.training.evaluate import Examples, loader
from restuning.utils.profiling import in_turn, saved_bytes, spread

BATCH, MAX_LENGTH, DONE = 32, 128, "done.json"


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


HEADS = (0.003, 0.001, 0.0003)
ROWS = [
    Row("linear", "mean", "mean", HEADS),
    Row("bypass-mean", "mean", "mean", HEADS),
    Row("linear", "cls", "first", HEADS),
    Row("bypass", "cls", "first", HEADS),
    Row("res-tuning", "mean", None, (0.001,)),
    Row("full", "mean", None, (0.00005,)),
    Row("lora", "mean", None, (0.001,)),
]
TASKS = ("SST-2", "RTE", "MNLI_10k")
EPOCHS = {"SST-2": (5, 2), "RTE": (30, 5), "MNLI_10k": (20, 3)}  # from a bank, inside the backbone
STEPS, ROUNDS = 20, 5
SEEDS = (0, 1, 2)  # from a bank; inside the backbone the first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/text"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    args = parser.parse_args()
    for task in args.tasks:
        spec = f"text:{args.data}/text/{task}"
        for tokens in ("mean", "first"):
            bank(spec, args.out / f"bank-{task}-{tokens}", tokens)
        for row in ROWS:
            one(args, task, spec, row)
            record(args)
        ratio(args, task, spec)
        record(args)


def bank(spec: str, out: Path, tokens: str) -> None:
    if not (out / MANIFEST).exists():
        how = {"tokens": tokens, "dtype": "float16", "max_length": MAX_LENGTH, "sizes": {}}
        build_bank(spec, out, backbone=MINILM, resume=out.exists(), progress=False, **how)


def one(args: argparse.Namespace, task: str, spec: str, row: Row) -> None:
    """A grid from the bank, and an epoch alone for its time; or one run inside the backbone."""
    out = folder(args, task, row)
    if (out / DONE).exists():
        return
    at = args.out / f"bank-{task}-{row.bank}"
    epochs = EPOCHS[task][0 if row.bank else 1]
    pool = None if row.method == "bypass-mean" else row.pool
    run = Run(
        data=spec,
        backbone=MINILM,
        method=row.method,
        bank=str(at) if row.bank else None,
        pool=pool,
        max_length=MAX_LENGTH,
        lrs=row.rates[:1],
        training=TrainConfig(epochs=1 if row.bank else epochs, batch_size=BATCH, group_by_length=row.bank is None),
    )
    finished = out / "run" / RESULT
    result = (
        json.loads(finished.read_text())
        if finished.exists()
        else execute(run, out / "run", resume=(out / "run" / RUN).exists())
    )
    found, rates = [result["test_accuracy"]], [result["lr"]]
    if row.bank:
        grid = Sweep(str(at), (row.method,), row.rates, (epochs,), SEEDS, pool, training=TrainConfig(batch_size=BATCH))
        seeds = sweep(grid, out / "sweep", resume=(out / "sweep").exists())["methods"][row.method]["seeds"]
        found, rates = [s["test_score"] for s in seeds], [s["lr"] for s in seeds]
    seconds = statistics.median(e["seconds"] for e in result.pop("epochs"))
    more = {
        "test_accuracies": found,
        "rates": rates,
        "epochs_trained": epochs,
        "epoch_seconds": seconds,
        "saved_bytes": kept_for_backward(run, result["classes"]),
        "commit": commit(),
    }
    if row.bank:  # of the run of one epoch, only what the grid's runs share
        result = {k: result[k] for k in ("examples", "classes", "parameters", "kept_features", "versions")}
        more["grid"] = {"rates": row.rates, "seeds": SEEDS, "bank": str(at), "pool": pool}
    (out / DONE).write_text(json.dumps({"task": task, "row": row.name, **result, **more}) + "\n")
    print(f"{task}, {row.name}: {statistics.fmean(found):.2f} % at lr {rates}", flush=True)


def ratio(args: argparse.Namespace, task: str, spec: str) -> None:
    """An epoch of bypass from the bank of CLS over one of full fine-tuning, both of as many batches: steps in turn,
    round by round, reading and the optimizer included."""
    out = args.out / f"{task}-ratio.json"
    if out.exists():
        return
    backbone, data, opened = load_backbone(MINILM), load_task(spec), Bank(args.out / f"bank-{task}-first", verify=False)
    side = adapt(backbone, "bypass", len(data.classes)).train()
    full = adapt(load_backbone(MINILM), "full", len(data.classes), pool="mean").train()
    texts = prepared(data.train, reading_of(backbone, max_length=MAX_LENGTH))
    kept = FromBank(opened, opened.source().train).kept()

    def steps(model: nn.Module, trained: nn.Module, examples: Examples, lengths: list[int] | None) -> Callable:
        optimizer = torch.optim.AdamW(p for p in trained.parameters() if p.requires_grad)
        batches = cycle(data_order(len(examples), BATCH, 0, 0, lengths))

        def call() -> None:
            for inputs, labels in loader(examples, batch_sampler=[next(batches) for _ in range(STEPS)]):
                loss = nn.functional.cross_entropy(model(inputs), labels)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()

        return call

    calls = {
        "full": steps(full, full, texts, texts.lengths),
        "bank": steps(FromFeatures(side, opened.view, opened.layers), side, kept, None),
    }
    times = in_turn(calls, ROUNDS)
    out.write_text(json.dumps(spread(times["bank"], times["full"])) + "\n")


def folder(args: argparse.Namespace, task: str, row: Row) -> Path:
    return args.out / f"{task}-{row.method}-{row.pool}"


def kept_for_backward(run: Run, classes: int) -> int:
    """Bytes that autograd keeps for one batch: the first training texts that the run reads."""
    if run.bank is not None:
        opened = Bank(run.bank, verify=False)
        tuned = adapt(load_backbone(run.backbone), run.spec(), classes, pool=run.pool).train()
        features = opened.rows("train").fetch(range(BATCH))[0]
        model = FromFeatures(tuned, opened.view, opened.layers)
        return saved_bytes(lambda: model(features), tuned.parameters())
    backbone = load_backbone(run.backbone)
    task = load_task(run.data)
    how = reading_of(backbone, max_length=run.max_length)
    inputs, _ = next(iter(loader(prepared(task.train, how), BATCH)))
    tuned = adapt(backbone, run.spec(), classes, pool=run.pool).train()
    with torch.enable_grad():
        return saved_bytes(lambda: tuned(inputs), tuned.parameters())


def record(args: argparse.Namespace) -> None:
    """Both files, from what is done so far."""
    files = [folder(args, task, row) / DONE for task in TASKS for row in ROWS]
    rows = [json.loads(file.read_text()) for file in files if file.exists()]
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = []
    for task in TASKS:
        mine = {r["row"]: r for r in rows if r["task"] == task}
        if not mine:
            continue
        table += [
            f"## {task}",
            "",
            "| method | reads | test accuracy | seeds | epochs | rate | trained | kept, MiB | seconds an epoch |",
            "|---|---|--:|--:|--:|---|--:|--:|--:|",
        ]
        for row in ROWS:
            if (r := mine.get(row.name)) is None:
                continue
            found = r["test_accuracies"]
            spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            cells = [
                row.name,
                f"a bank, {row.bank if row.bank == 'mean' else 'CLS'}" if row.bank else "texts",
                f"{statistics.fmean(found):.2f}{spread}",
                str(len(found)),
                str(r["epochs_trained"]),
                ", ".join(f"{rate:g}" for rate in sorted(set(r["rates"]))),
                f"{r['parameters']['trainable']:,}",
                f"{r['saved_bytes'] / 2**20:.2f}",
                f"{r['epoch_seconds']:.1f}",
            ]
            table.append(f"| {' | '.join(cells)} |")
        table.append("")
        if (found := args.out / f"{task}-ratio.json").exists():
            r = json.loads(found.read_text())
            table += [
                f"An epoch of bypass from the bank of CLS takes {r['median']:.4f} ({r['min']:.4f} to {r['max']:.4f})",
                f"of an epoch of full fine-tuning: {STEPS} steps of each in turn, {ROUNDS} rounds.",
                "",
            ]
    commits = ", ".join(dict.fromkeys(r["commit"] for r in rows))
    text = f"""# MiniLM on text tasks

{MINILM} (6 blocks, width 384). SST-2: 67,349 sentences, tested on the 1,821 labelled ones; MNLI_10k:
8,999 pairs, tested on 1,000; RTE: 2,490 pairs, tested on 277. Texts cut to {MAX_LENGTH} tokens, batch {BATCH}, weight
decay 0.05, the last epoch. Every head reads the mean of a text's tokens (`bypass-mean` runs on that mean alone), but
for the rows named CLS. Banks hold float16. Where a method has several rates ({", ".join(map(str, HEADS))}),
validation chose: SST-2's own dev sentences, elsewhere a fifth of the training pairs. Bytes kept for backward: of one
batch, the first {BATCH} training texts.

{chr(10).join(table)}
Command: `python scripts/bench_text.py`; commits {commits}; torch {rows[0]["versions"]["torch"]}, CPU,
{torch.get_num_threads()} thread(s), other work beside it. Every figure with its settings: `text.jsonl`.
"""
    (args.results / "text.md").write_text(text)


if __name__ == "__main__":
    main()

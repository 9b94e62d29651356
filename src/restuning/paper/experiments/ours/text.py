"""MiniLM on SST-2, RTE and MNLI (10,000 pairs): from banks of features, and inside the backbone.

Every head reads the mean of a text's tokens, but for the two rows named CLS. Rates are chosen on validation (SST-2's
own dev sentences; elsewhere a fifth of the training pairs) where there are several; each method is tested once, at its
last epoch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import torch
from torch import nn

from restuning.backbones.load import load_backbone, reading_of
from restuning.data import Tokenised, load_task, prepared
from restuning.errors import RestuningError
from restuning.features.bank import Bank, FromBank, FromFeatures
from restuning.features.bank.format import MANIFEST
from restuning.methods.named import find_method
from restuning.model.tuned import adapt
from restuning.paper.experiments.measured import DONE, Place, mean, mib, once, ratio, table, trained
from restuning.paper.results import Record
from restuning.runs.banks import BankSettings, build_bank
from restuning.runs.settings import Run
from restuning.runs.sweep import Sweep, sweep
from restuning.training.config import TrainConfig, data_order
from restuning.training.evaluate import Examples, loader
from restuning.utils.hub import MINILM
from restuning.utils.profiling import in_turn, saved_bytes, spread

BATCH, MAX_LENGTH = 32, 128
HEADS = (0.003, 0.001, 0.0003)


@dataclass(frozen=True)
class Row:
    """A method: on which tokens its bank is, or None inside the backbone; the rates tried; epochs, where they are not
    the task's."""

    method: str
    pool: str = "mean"
    bank: str | None = None
    rates: tuple[float, ...] = HEADS
    epochs: int | None = None

    @property
    def name(self) -> str:
        return f"{self.method} (CLS)" if self.pool == "cls" else self.method


COMPONENTS = "pca:128"
ROWS = (
    Row("linear", bank="mean"),
    Row("bypass-mean", bank="mean"),
    Row("linear", "cls", "first"),
    Row("bypass", "cls", "first"),
    Row("linear-all", bank=COMPONENTS),
    Row("bypass-query", bank=COMPONENTS, rates=(0.001,), epochs=4),
    Row("res-tuning", rates=(0.001,)),
    Row("full", rates=(0.00005,)),
    Row("lora", rates=(0.001,)),
)
EPOCHS = {"SST-2": (5, 2), "RTE": (30, 5), "MNLI_10k": (20, 3)}  # from a bank, inside the backbone
STEPS, ROUNDS = 20, 5
SEEDS = (0, 1, 2)  # from a bank; inside the backbone the first


@dataclass(frozen=True)
class Text:
    """Nine rows on three tasks, or some of them.

    Args:
        tasks: names, between spaces.
        rows: likewise; empty: all.
        items: training texts of a bank, at most; 0: all.
    """

    tasks: str = " ".join(EPOCHS)
    rows: str = ""
    items: int = 0

    def __post_init__(self) -> None:
        for value, known in ((self.tasks, tuple(EPOCHS)), (self.rows, tuple(row.name for row in ROWS))):
            if wrong := [name for name in value.split() if name not in known]:
                raise RestuningError(f"--set of text: unknown {wrong[0]!r}, expected of {', '.join(known)}")

    def run(self, place: Place) -> Iterator[Record]:
        rows = [row for row in ROWS if not self.rows or row.name in self.rows.split()]
        for task in self.tasks.split():
            data = f"text:{place.data}/text/{task}"
            for tokens in sorted({row.bank for row in rows if row.bank} | (set() if self.rows else {"first"})):
                out = _bank(place, task, tokens)
                if not (out / MANIFEST).exists():
                    settings = BankSettings(
                        data,
                        MINILM,
                        max_length=MAX_LENGTH,
                        tokens=tokens,
                        dtype="float16",
                        train_size=self.items or None,
                    )
                    build_bank(settings, out, resume=out.exists(), progress=False)
            for row in rows:
                folder = place.out / f"{task}-{row.method}-{row.pool}"
                record = once(folder / DONE, partial(_one, place, task, data, row))
                yield {"task": task, "row": row.name, **record}
            if not self.rows:
                found = once(place.out / f"{task}-ratio.json", partial(_ratio, place, task, data))
                yield {"task": task, **found}

    def text(self, records: Sequence[Record]) -> str:
        columns = ["method", "reads", "test accuracy", "seeds", "epochs", "rate", "trained", "kept, MiB"]
        parts = [
            f"""# MiniLM on text tasks

{MINILM} (6 blocks, width 384). Texts cut to {MAX_LENGTH} tokens, batch {BATCH}, weight decay 0.05, the last epoch.
Every head reads the mean of a text's tokens (`bypass-mean` runs on that mean alone), but for the rows named CLS. Banks
hold float16; `{COMPONENTS}` are 128 components of every token of every layer, and the means in full. Where a method has
several rates ({", ".join(map(str, HEADS))}), validation chose: SST-2's own dev sentences, elsewhere a fifth of the
training pairs. Bytes kept for backward: of one batch, the first {BATCH} training texts."""
        ]
        for task in EPOCHS:
            mine = {r.get("row"): r for r in records if r["task"] == task}
            rows = []
            for row in ROWS:
                if (r := mine.get(row.name)) is not None:
                    rows.append(
                        [
                            row.name,
                            f"a bank, {'CLS' if row.bank == 'first' else row.bank}" if row.bank else "texts",
                            mean(r["test_accuracies"]),
                            str(len(r["test_accuracies"])),
                            str(r["epochs_trained"]),
                            ", ".join(f"{rate:g}" for rate in sorted(set(r["rates"]))),
                            f"{r['parameters']['trainable']:,}",
                            mib(r["saved_bytes"]),
                            f"{r['epoch_seconds']:.1f}",
                        ]
                    )
            if rows:
                counts = next(r["examples"] for r in mine.values() if "examples" in r)
                parts.append(f"## {task}: {counts['train']:,} training, {counts['test']:,} test examples")
                parts.append(table([*columns, "seconds an epoch"], rows))
            if (r := mine.get(None)) is not None:
                parts.append(
                    f"An epoch of bypass from the bank of CLS takes {ratio(r, 4)}\n"
                    f"of an epoch of full fine-tuning: {STEPS} steps of each in turn, {ROUNDS} rounds."
                )
        return "\n\n".join(parts)


def _bank(place: Place, task: str, tokens: str) -> Path:
    return place.out / f"bank-{task}-{tokens.replace(':', '')}"


def _one(place: Place, task: str, data: str, row: Row) -> Record:
    """A grid from the bank, and an epoch alone for its time; or one run inside the backbone."""
    out, at = place.out / f"{task}-{row.method}-{row.pool}", _bank(place, task, row.bank or "")
    epochs = row.epochs or EPOCHS[task][0 if row.bank else 1]
    pool = None if row.method == "bypass-mean" or row.bank == COMPONENTS else row.pool
    run = Run(
        data=data,
        backbone=MINILM,
        method=row.method,
        bank=str(at) if row.bank else None,
        pool=pool,
        max_length=MAX_LENGTH,
        lrs=row.rates[:1],
        training=TrainConfig(epochs=1 if row.bank else epochs, batch_size=BATCH, group_by_length=row.bank is None),
    )
    result = trained(run, out / "run")
    found, rates = [result["test_accuracy"]], [result["lr"]]
    more = {
        "epochs_trained": epochs,
        "epoch_seconds": result["epoch_seconds"],
        "saved_bytes": _kept(run, result["classes"]),
    }
    if row.bank:  # of the run of one epoch, only what the grid's runs share
        grid = Sweep(str(at), (row.method,), row.rates, (epochs,), SEEDS, pool, training=TrainConfig(batch_size=BATCH))
        seeds = sweep(grid, out / "sweep", resume=(out / "sweep").exists())["methods"][row.method]["seeds"]
        found, rates = [s["test_score"] for s in seeds], [s["lr"] for s in seeds]
        result = {k: result[k] for k in ("examples", "classes", "parameters", "kept_features")}
        more["grid"] = asdict(grid)
    return {**result, "test_accuracies": found, "rates": rates, **more}


def _ratio(place: Place, task: str, data: str) -> Record:
    """An epoch of bypass from the bank of CLS over one of full fine-tuning, both of as many batches: steps in turn,
    round by round, reading and the optimizer included."""
    loaded, opened = load_task(data), Bank(place.out / f"bank-{task}-first", verify=False)
    side = adapt(load_backbone(MINILM), "bypass", len(loaded.classes)).train()
    full = adapt(load_backbone(MINILM), "full", len(loaded.classes), pool="mean").train()
    texts = prepared(loaded.train, reading_of(load_backbone(MINILM), max_length=MAX_LENGTH))
    assert isinstance(texts, Tokenised)
    kept = FromBank(opened, opened.source().train).kept()

    def steps(
        model: nn.Module, trained: nn.Module, examples: Examples, lengths: Sequence[int] | None
    ) -> Callable[[], None]:
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
        "bank": steps(FromFeatures(side), side, kept, None),
    }
    times = in_turn(calls, ROUNDS)
    return spread(times["bank"], times["full"])


def _kept(run: Run, classes: int) -> int:
    """Bytes that autograd keeps for one batch: the first training texts that the run reads."""
    backbone = load_backbone(run.backbone)
    opened = None if run.bank is None else Bank(run.bank, verify=False)
    method = run.spec() if opened is None else opened.fitted(find_method(run.spec()))
    tuned = adapt(backbone, method, classes, pool=run.pool).train()
    if opened is not None:
        features = opened.rows("train").fetch(range(BATCH))[0]
        model = FromFeatures(tuned)
        return saved_bytes(lambda: model(features), tuned.parameters())
    texts = prepared(load_task(run.data).train, reading_of(backbone, max_length=run.max_length))
    inputs, _ = next(iter(loader(texts, BATCH)))
    return saved_bytes(lambda: tuned(inputs), tuned.parameters())

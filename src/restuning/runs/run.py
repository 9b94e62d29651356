"""A recorded run: its settings as data, and the one procedure that turns them into a saved adapter and a result."""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from restuning.backbones.load import MICRO
from restuning.data import (
    Task,
    check,
    load_task,
    split,
    without_bad,
)
from restuning.data.objective import Objective, balanced, objective, sort_key
from restuning.errors import Diverged, RestuningError
from restuning.features.bank import (
    Bank,
    CachedFeatures,
    FromBank,
    FromFeatures,
)
from restuning.methods.named import find_method, rates_of
from restuning.methods.spec import Full
from restuning.model.count import count
from restuning.runs.banks import _agree
from restuning.runs.folder import finished, run_directory
from restuning.runs.settings import RESULT, TRIALS, Run, versions
from restuning.runs.sources import _FromBank, _FromItems, _Prepared
from restuning.training.config import TrainConfig
from restuning.training.evaluate import Examples, evaluate
from restuning.training.logging import log
from restuning.training.loop import fit
from restuning.utils.distributed import barrier, is_main_process
from restuning.utils.files import as_json, atomic_write
from restuning.utils.hub import pinned
from restuning.utils.reading import read_json


def execute(
    run: Run,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = True,
    tensorboard: bool = False,
    shard: bool = False,
) -> dict[str, Any]:
    """Train, test, save: run.json, the adapter and result.json in `out`. Returns what result.json holds. Of several
    processes (`accelerate launch`), all train and the first one writes; with `shard` each holds a share of the frozen
    backbone (see `Tuned.shard`), which changes nothing else.

    Raises RestuningError if `out` is in use, holds another run, or (without `resume`) any run.
    """
    if shard and isinstance(find_method(run.method), Full):
        raise RestuningError("full fine-tuning trains all weights of the backbone, and only a frozen one is shared out")
    if run.bank is not None:
        _agree(run, run.bank)
    else:
        tokenizer = None if run.tokenizer is None else pinned(run.tokenizer, "tokenizer_config.json")
        run = replace(run, backbone=pinned(run.backbone), tokenizer=tokenizer)
    if resume and (before := finished(out, run)) is not None:
        return before
    barrier()
    with run_directory(out, run, resume) if is_main_process() else contextlib.nullcontext():
        processes = barrier()
        start = time.perf_counter()
        sizes = {"train_size": run.train_size, "shots": run.shots, "test_size": run.test_size}
        sizes["seed"] = run.training.seed
        bank = None if run.bank is None else Bank(run.bank)
        load = partial(load_task, run.data) if bank is None else partial(split, run.data, bank.source())
        whole = load(**sizes, val_size=0 if run.lrs is not None and len(run.lrs) > 1 else run.val_size)
        if bank is None:
            if run.skip_bad:
                val = None if whole.val is None else without_bad(whole.val)
                whole = replace(whole, train=without_bad(whole.train), val=val, test=without_bad(whole.test))
            for items in filter(None, (whole.train, whole.val, whole.test)):
                check(items)
            task: _Prepared = _FromItems(run, whole, shard)
        elif shard:
            raise RestuningError("a run from a bank holds no backbone: there is nothing to share out")
        else:
            task = _FromBank(run, whole, bank)
        cheap = run.lrs is None and run.training.patience is None and task.keeps()
        rates = run.lrs or rates_of(run.method, len(whole.train), cheap)
        if run.training.patience is not None and len(rates) > 1 and whole.val is None:
            raise RestuningError("patience with several rates wants data with a validation split: give one rate")
        opening = [_opening(run, whole, task)] if progress and is_main_process() else []
        lr, trials = rates[0], dict[str, float | None]()
        if len(rates) > 1:
            held = whole
            if whole.val is None or run.val_size:
                held = load(**sizes, val_size=run.val_size or max(1, len(whole.train) // 5))
                if run.skip_bad and bank is None:
                    held = replace(held, train=without_bad(held.train), val=held.val and without_bad(held.val))
            trials = _choose(run, rates, task, held, out, resume, progress, opening)
            lr = max(rates, key=lambda rate: sort_key(trials[str(rate)]))
        if trials:
            log(f"lr {lr:g} was the best", progress and is_main_process())
        model, tuned = task.model(whole.train)
        _print_once(opening)
        examples = task.read(tuned, whole.train, run.augment)
        history = fit(
            model,
            examples,
            None if whole.val is None else task.read(tuned, whole.val),
            _training(run, lr, examples),
            state=out / "state.pt",
            resume=resume,
            progress=progress,
            objective=_objective(run, whole),
            tracker=out / "tensorboard" if tensorboard else None,
        )
        metrics = dict(evaluate(model, task.read(tuned, whole.test), run.training.batch_size, kind=whole.kind))
        result = {
            "metric": next(iter(metrics)),
            **{f"test_{name}": value for name, value in metrics.items()},
            "lr": lr,
            "validation_score": trials,
            "epochs": [asdict(epoch) for epoch in history.epochs],
            "stopped": history.stopped,
            "examples": {"train": len(whole.train), "val": len(whole.val or ()), "test": len(whole.test)},
            "classes": len(whole.classes),
            "parameters": count(tuned),
            "kept_features": isinstance(model, FromFeatures),
            "processes": processes,
            "seconds": round(time.perf_counter() - start, 1),
            "versions": versions(),
            "settings": run.to_dict(),
        }
        if is_main_process():
            tuned.save_pretrained(out)
            atomic_write(out / RESULT, as_json(result))
            (out / "state.pt").unlink(missing_ok=True)
        barrier()
        return result


def _opening(run: Run, whole: Task, task: "_Prepared") -> str:
    """What is trained on what, before the first epoch."""
    backbone = f"backbone {run.backbone}"
    if isinstance(task, _FromItems):
        backbone += f", {sum(p.numel() for p in task.backbone.parameters()) / 1e6:.1f}M parameters"
    if run.backbone == MICRO:
        backbone += " (bundled and small, to try things out; for accuracy --backbone vit_base_patch16_224 or hf:FOLDER)"
    method = run.method if isinstance(run.method, str) else "a method of its own"
    kept = "from a bank" if run.bank else f"of {run.data}"
    return f"{backbone}; {method}; {len(whole.train)} items {kept} to train on, {len(whole.test)} to test on"


def _print_once(lines: list[str]) -> None:
    """After what may be refused, for a refusal is one line."""
    while lines:
        print(lines.pop(0), file=sys.stderr, flush=True)


def _choose(
    run: Run,
    rates: Sequence[float],
    task: "_Prepared",
    held: Task,
    out: Path,
    resume: bool,
    progress: bool,
    opening: list[str],
) -> dict[str, float | None]:
    """The validation score of every rate, at the last epoch; those already measured are not measured again."""
    file = out / TRIALS
    trials: dict[str, float | None] = read_json(file) if resume and file.exists() else {}
    assert held.val is not None
    for lr in rates:
        if str(lr) in trials:
            continue
        model, tuned = task.model(held.train)
        _print_once(opening)
        log(f"lr {lr:g}, to be compared on {len(held.val)} validation items", progress and is_main_process())
        state, examples = out / f"trial-{lr}.pt", task.read(tuned, held.train, run.augment)
        val = task.read(tuned, held.val)
        try:
            fit(
                model,
                examples,
                val,
                _training(run, lr, examples),
                state=state,
                resume=resume,
                progress=progress,
                objective=_objective(run, held),
            )
            trials[str(lr)] = next(evaluate(model, val, run.training.batch_size, kind=held.kind))[1]
        except Diverged:  # a rate that is too high is no choice, and no reason to stop
            trials[str(lr)] = None
        if is_main_process():
            atomic_write(file, as_json(trials))
            state.unlink(missing_ok=True)
    return trials


def _training(run: Run, lr: float, examples: Examples) -> TrainConfig:
    """Features that are kept have no length any more."""
    grouped = run.training.group_by_length and not isinstance(examples, CachedFeatures | FromBank)
    return replace(run.training, lr=lr, group_by_length=grouped)


def _objective(run: Run, task: Task) -> Objective:
    weights = balanced(task.kind, task.train.labels, len(task.classes)) if run.class_weights else None
    return objective(task.kind, weights, run.training.label_smoothing)

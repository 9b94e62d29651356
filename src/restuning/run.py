"""A recorded run: its settings as data, and the one procedure that turns them into a saved adapter and a result."""

import contextlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from restuning._version import __version__
from restuning.adapt import Tuned, adapt
from restuning.backbones import MICRO, describe_backbone, load_backbone, preprocessing_of, reading_of
from restuning.bank import LIMIT, Bank, FromBank, FromFeatures, Kept, build, bytes_each, keep
from restuning.bank.components import Components, fit_components, widths_of
from restuning.bank.store import COMPONENTS, bytes_kept
from restuning.data import (
    Items,
    Prepared,
    Preprocess,
    Reading,
    Task,
    Tokenise,
    check,
    load_task,
    prepared,
    reading,
    split,
)
from restuning.errors import CheckpointError, Diverged, RestuningError
from restuning.evaluate import Examples, evaluate
from restuning.files import as_json, contents, locked, write_whole
from restuning.initialise import initialise, needs_data
from restuning.measure import count
from restuning.methods import Bypass, BypassQuery, Full, LinearAll, Method, find_method, on_blocks, resize
from restuning.objective import Objective, balanced, objective, worth
from restuning.processes import is_first, meet
from restuning.progress import bar
from restuning.recipe import TrainConfig
from restuning.train import fit
from restuning.wiring.live import MEAN

RUN, RESULT, TRIALS = "run.json", "result.json", "trials.json"


@dataclass(frozen=True)
class Run:
    """Everything that decides a run's outcome. `bank`: a folder of kept features, read in place of items and backbone.

    Several rates in `lrs`: chosen on the data's own validation split; where there is none (or with `val_size`) on
    training items held out, then trained again on all of these (VTAB-1k's protocol). Tested once, at the last epoch.
    """

    data: str
    method: str | Mapping[str, Any] = "res-tuning"
    backbone: str = MICRO
    weights: str | None = None
    image_size: int | None = None
    bank: str | None = None
    size: int | None = None
    blocks: tuple[int, ...] | None = None
    pool: str | None = None
    train_size: int | None = None
    shots: int | None = None
    val_size: int = 0
    test_size: int | None = None
    augment: bool = False
    crop: bool = False
    tokenizer: str | None = None
    max_length: int | None = None
    class_weights: Literal["balanced"] | None = None
    keep_features: bool = True
    lrs: tuple[float, ...] = (1e-3,)
    training: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not self.lrs:
            raise RestuningError("no learning rate: expected at least one")
        for lr in self.lrs:
            replace(self.training, lr=lr)
        find_method(self.method)
        if self.class_weights not in (None, "balanced"):
            raise RestuningError(f"class weights {self.class_weights!r}: expected balanced, or none")

    def spec(self, family: str = "") -> str | Method:
        """The method as a family of backbones has it, by its name where it is the named one."""
        if isinstance(self.method, str) and self.size is None and self.blocks is None:
            return self.method
        method = find_method(self.method, family)
        method = method if self.size is None else resize(method, self.size)
        return method if self.blocks is None else on_blocks(method, self.blocks)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Run":
        """The inverse of `to_dict`. Raises RestuningError for settings that are unknown or missing."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown or "data" not in data:
            raise RestuningError(f"a run with unknown settings {unknown}" if unknown else "a run without 'data'")
        blocks = data.get("blocks")
        try:
            training = TrainConfig(**data.get("training", {}))
        except TypeError as error:
            raise RestuningError(f"a run with unknown training settings: {error}") from error
        return cls(
            **{
                **data,
                "blocks": None if blocks is None else tuple(blocks),
                "lrs": tuple(data.get("lrs", (1e-3,))),
                "training": training,
            }
        )


def read_run(path: Path) -> Run:
    """A run.json. Raises RestuningError if it is not there or cannot be read."""
    try:
        return Run.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise RestuningError(f"no recorded run at {path}: expected a {RUN}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise RestuningError(f"{path} is damaged: {error}") from error


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
    meet()
    with claimed(out, run, resume) if is_first() else contextlib.nullcontext():
        processes = meet()
        start = time.perf_counter()
        sizes = {"train_size": run.train_size, "shots": run.shots, "test_size": run.test_size}
        sizes["seed"] = run.training.seed
        bank = None if run.bank is None else Bank(run.bank)
        load = partial(load_task, run.data) if bank is None else partial(split, run.data, bank.source())
        whole = load(**sizes, val_size=0 if len(run.lrs) > 1 else run.val_size)
        if bank is None:
            for items in filter(None, (whole.train, whole.val, whole.test)):
                check(items)
            task: _Prepared = _FromItems(run, whole, shard)
        elif shard:
            raise RestuningError("a run from a bank holds no backbone: there is nothing to share out")
        else:
            task = _FromBank(run, whole, bank)
        if run.training.patience is not None and len(run.lrs) > 1 and whole.val is None:
            raise RestuningError("patience with several rates wants data with a validation split: give one rate")
        lr, trials = run.lrs[0], dict[str, float | None]()
        if len(run.lrs) > 1:
            held = whole
            if whole.val is None or run.val_size:
                held = load(**sizes, val_size=run.val_size or max(1, len(whole.train) // 5))
            trials = _choose(run, task, held, out, resume, progress)
            lr = max(run.lrs, key=lambda rate: worth(trials[str(rate)]))
        model, tuned = task.model(whole.train)
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
        if is_first():
            tuned.save_pretrained(out)
            write_whole(out / RESULT, as_json(result))
            (out / "state.pt").unlink(missing_ok=True)
        meet()
        return result


def _choose(
    run: Run, task: "_Prepared", held: Task, out: Path, resume: bool, progress: bool
) -> dict[str, float | None]:
    """The validation score of every rate, at the last epoch; those already measured are not measured again."""
    file = out / TRIALS
    trials: dict[str, float | None] = json.loads(file.read_text()) if resume and file.exists() else {}
    assert held.val is not None
    for lr in run.lrs:
        if str(lr) in trials:
            continue
        model, tuned = task.model(held.train)
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
        if is_first():
            write_whole(file, as_json(trials))
            state.unlink(missing_ok=True)
    return trials


def _training(run: Run, lr: float, examples: Examples) -> TrainConfig:
    """Features that are kept have no length any more."""
    grouped = run.training.group_by_length and not isinstance(examples, Kept | FromBank)
    return replace(run.training, lr=lr, group_by_length=grouped)


def _objective(run: Run, task: Task) -> Objective:
    weights = balanced(task.kind, task.train.labels, len(task.classes)) if run.class_weights else None
    return objective(task.kind, weights, run.training.label_smoothing)


class _Prepared(Protocol):
    """Models of a run, and items as they read them."""

    def model(self, train: Items) -> tuple[nn.Module, Tuned]:
        """A newly born tuned model, the same at each call; what begins from data begins from `train`."""
        ...

    def read(self, tuned: Tuned, items: Items, augment: bool = False) -> Examples: ...


class _FromItems:
    """Items as pixels or tokens, or (where nothing is tuned inside a frozen backbone, and they never change) the
    features that the backbone made of them, computed once."""

    def __init__(self, run: Run, whole: Task, shard: bool = False) -> None:
        self.run, self.whole = run, whole
        self.backbone = load_backbone(run.backbone, run.weights, run.image_size)
        self.how = reading_of(self.backbone, run.image_size, run.crop, run.tokenizer, run.max_length)
        self.fits: bool | None = None
        self.plain: dict[tuple[str, ...], Examples] = {}
        self.kept: dict[tuple[str, ...], Examples] = {}
        state = self.backbone.state_dict()
        self.came = {k: v.clone() for k, v in state.items()} if isinstance(find_method(run.method), Full) else None
        self.sharded: Tuned | None = None
        if shard:
            self.sharded = Tuned(self.backbone, backbone_name=run.backbone)
            self.sharded.shard("cuda" if torch.cuda.is_available() else "cpu")

    def model(self, train: Items) -> tuple[nn.Module, Tuned]:
        torch.manual_seed(self.run.training.seed)
        if self.came is not None:
            self.backbone.load_state_dict(self.came)
        tuned = self.sharded or Tuned(self.backbone, backbone_name=self.run.backbone)
        for name in list(tuned.adapters):  # of the rate before
            tuned.delete_adapter(name)
        _adapted(tuned, self.run, self.whole, self.how)
        if torch.cuda.is_available():
            tuned.cuda()
        if needs_data(tuned):
            initialise(tuned, self._examples(train), self.run.training.seed)
        return (FromFeatures(tuned) if self._keeps(tuned) else tuned), tuned

    def read(self, tuned: Tuned, items: Items, augment: bool = False) -> Examples:
        if augment:
            return prepared(items, self.how, True, self.run.training.seed)
        if not self._keeps(tuned):
            return self._examples(items)
        key = tuple(items.names)
        if key not in self.kept:
            self.kept[key] = keep(tuned, self._examples(items), self.run.training.batch_size)
        return self.kept[key]

    def _examples(self, items: Items) -> Examples:
        key = tuple(items.names)
        if key not in self.plain:
            made = prepared(items, self.how)
            if isinstance(made, Prepared):  # it keeps its own pixels, for as long as it is used
                return made
            self.plain[key] = made
        return self.plain[key]

    def _keeps(self, tuned: Tuned) -> bool:
        if not self.run.keep_features or self.run.augment or not tuned.reads_features or self.whole.kind == "per-token":
            return False
        if self.fits is None:
            whole = self.whole
            items = 2 * len(whole.train) + len(whole.val or ()) + len(whole.test)  # a part of it, and all
            self.fits = bytes_each(tuned, self._examples(whole.train)) * items <= LIMIT
        return self.fits


class _FromBank:
    """Rows of a bank; of the backbone no more than its tail is in memory."""

    def __init__(self, run: Run, whole: Task, bank: Bank) -> None:
        self.run, self.whole, self.bank = run, whole, bank
        self.kept: dict[tuple[str, ...], Examples] = {}

    def model(self, train: Items) -> tuple[nn.Module, Tuned]:
        torch.manual_seed(self.run.training.seed)
        tuned = self.bank.tuned(describe_backbone(self.run.backbone))
        _adapted(tuned, self.run, self.whole, reading(self.bank.preprocessing), self.bank)
        self.bank.accepts(tuned)
        if self.bank.components is not None:
            tuned._find("default").fix(self.bank.components.bases)
        return FromFeatures(tuned, self.bank.view, self.bank.layers), tuned

    def read(self, tuned: Tuned, items: Items, augment: bool = False) -> Examples:
        rows, key = FromBank(self.bank, items), tuple(items.names)
        if self.bank.views > 1 or 2 * self.bank.bytes > LIMIT:  # a part of it, and all
            return rows
        if key not in self.kept:
            self.kept[key] = rows.kept()
        return self.kept[key]


def _adapted(tuned: Tuned, run: Run, whole: Task, how: Reading, bank: Bank | None = None) -> None:
    spec = run.spec(tuned.family)
    if bank is not None and bank.components is not None:
        spec = bank.fitted(find_method(spec, tuned.family))
    tuned.add_adapter(
        "default",
        spec,
        len(whole.classes),
        pool=run.pool,
        classes=whole.classes,
        preprocessing=how.to_dict(),
        kind=whole.kind,
    )


class Settings(Protocol):
    """What decides a run's outcome, as plain data."""

    def to_dict(self) -> dict[str, Any]: ...


@contextlib.contextmanager
def claimed(
    out: Path, run: Settings, resume: bool, read: Callable[[Path], Settings] = read_run, done: str = RESULT
) -> Iterator[None]:
    """The output folder for this run alone. Nothing of an earlier one is overwritten. read: of a recorded one; done:
    the file that a finished one has."""
    made = not out.exists()
    with locked(out):
        record = out / RUN
        there = contents(out)
        new = not there
        if record.exists() and not resume:
            state = "a finished run" if (out / done).exists() else "an unfinished run: continue it with --resume"
            raise RestuningError(f"{out} holds {state}; choose another folder for a new one")
        if there and not record.exists():
            raise RestuningError(f"{out} is not empty and holds no run ({', '.join(there[:3])}): choose another folder")
        if record.exists() and read(record) != run:
            before, now = read(record).to_dict(), run.to_dict()
            other = [f"{k} was {before[k]}, is {now[k]}" for k in now if as_json(before[k]) != as_json(now[k])]
            raise RestuningError(f"{out} holds a run of other settings: {'; '.join(other)}")
        if record.exists() and (out / done).exists():
            raise RestuningError(f"{out} holds a finished run: there is nothing to resume")
        try:
            write_whole(record, as_json(run.to_dict()))
            yield
        except OSError as error:
            raise RestuningError(f"cannot write to {out}: {error.strerror or error}") from error
        except RestuningError:
            own = {RUN, ".lock"}
            if new and all(p.is_dir() or p.name in own for p in out.rglob("*")):
                for name in own:  # a run that never started leaves nothing behind
                    (out / name).unlink(missing_ok=True)
                if made:
                    shutil.rmtree(out)
            raise


def from_bank(path: str | Path) -> dict[str, Any]:
    """The settings of a run that a bank decides: data, what of it is tested on, and backbone, as they were when it was
    built."""
    manifest = Bank(path, verify=False).manifest
    sizes = {"test_size": manifest.get("test_size")}
    return {"data": manifest["data"]["spec"], "bank": str(path), **sizes, **manifest["source"]}


def _agree(run: Run, bank: str) -> None:
    """Raises RestuningError for settings that a bank decides, and that are others here."""
    held = from_bank(bank)
    other = next((name for name, value in held.items() if getattr(run, name) != value), None)
    if other is not None:
        raise RestuningError(f"{bank} is of {other} {held[other]!r}: leave out {getattr(run, other)!r}")
    if run.augment:
        raise RestuningError(f"{bank} holds features: augmented ones are built by restuning bank --views")


def on_bank(run: Run, whole: Task, bank: Bank) -> Callable[[], FromFeatures]:
    """A maker of the run's newly born models, each on what is left of a backbone without its weights."""
    prepared = _FromBank(run, whole, bank)

    def born() -> FromFeatures:
        model, _ = prepared.model(whole.train)
        assert isinstance(model, FromFeatures)
        return model

    return born


def build_bank(
    data: str,
    out: Path,
    *,
    backbone: str = MICRO,
    weights: str | None = None,
    image_size: int | None = None,
    crop: bool = False,
    tokenizer: str | None = None,
    max_length: int | None = None,
    tokens: str | None = None,
    sizes: Mapping[str, int | None],
    progress: bool = True,
    say: Callable[[int, int], None] = lambda each, items: None,
    resume: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Load the data and the backbone, and build a bank of all layers; see `restuning.bank.build` for `settings`.

    tokens: `first`, `last`, `all`, `mean` (where there is no CLS beside patches), g for CLS and a g × g grid, `pooled`
    (what linear-all reads), `int8` (all tokens, each quantised), or `pca:K` and `pca:K:FILE` (K components of every
    token, fitted on the training items or taken from a file, and what is pooled); None: what the backbone's pooling
    sees. say: told the bytes of an item and how many there are, before anything is written.
    """
    model = load_backbone(backbone, weights, image_size)
    tokens, count, file = _components(tokens)
    if tokens == "int8":
        tokens, settings["dtype"] = "all", "int8"
    if tokens not in (None, "first", "last", "all", "mean", "pooled", "pca") and not tokens.isdecimal():
        raise RestuningError(
            f"tokens {tokens!r}: expected first, mean, all, last, pooled, int8, pca:K, or the cells a side of a grid"
        )
    reads: dict[str, Any] = {"image_size": image_size, "crop": crop, "tokenizer": tokenizer, "max_length": max_length}
    how = reading_of(model, **reads)
    grid = 1 if tokens == "mean" else int(tokens) if tokens is not None and tokens.isdecimal() else None
    # a mean over all tokens of a text has their mask kept too
    all_tokens = "cls+mean" if isinstance(how, Tokenise) else "none"
    pool = {"first": "cls", "last": "last", "all": all_tokens}.get(tokens or "")
    reader: Method = {"pooled": LinearAll(), "pca": BypassQuery()}.get(tokens or "", Bypass(grid=grid))
    tuned = adapt(model, reader, pool=pool, backbone_name=backbone)
    if tokens == "mean" and tuned._live() != MEAN:
        raise RestuningError("tokens 'mean': this backbone has tokens before its patches; 1 keeps CLS and the mean")
    if torch.cuda.is_available():
        tuned.cuda()
    task = load_task(data, **{"val_size": 0, **sizes})  # type: ignore[arg-type]
    components = None
    train = prepared(task.train, how, cache=False)
    if tokens == "pca":
        there = out / COMPONENTS if resume and (out / COMPONENTS).exists() else file
        components = Components.load(there) if there else fit_components(tuned, train, count, settings.get("batch_size", 32))
        components.check(widths_of(tuned, tuned._layers()), str(there))
        if components.count != count:
            raise RestuningError(f"{there} holds {components.count} components of a layer: expected {count}")
    items = len(task.train) * settings.get("views", 1) + len(task.val or ()) + len(task.test)
    say(bytes_kept(tuned, train, settings.get("dtype", "float32"), components), items)
    with bar(100, progress) as show:

        def seen(done: int, of: int) -> None:
            show(100 * done // of, f"{done} of {of}")

        source = {"backbone": backbone, "weights": weights, **reads}
        about = {"source": source, "test_size": sizes.get("test_size")}
        return build(tuned, task, how, out, about=about, seen=seen, components=components, resume=resume, **settings)


def _components(tokens: str | None) -> tuple[str | None, int, Path | None]:
    """`pca:K` or `pca:K:FILE` as ("pca", K, FILE); others as they are."""
    kind, _, rest = (tokens or "").partition(":")
    if kind != "pca":
        return tokens, 0, None
    count, _, file = rest.partition(":")
    if not count.isdecimal() or int(count) < 1:
        raise RestuningError(f"tokens {tokens!r}: expected pca:K or pca:K:FILE, with K components")
    return "pca", int(count), Path(file) if file else None


def load_tuned(folder: Path, weights: str | None = None, onto: nn.Module | None = None) -> Tuned:
    """A saved adapter on the backbone that its files name (or on the one given).

    Weights come from `weights`, else from the run.json beside the adapter, else by the backbone's name.
    """
    from restuning.saved import read

    card, _ = read(folder)
    if weights is None and (folder / RUN).exists():
        weights = read_run(folder / RUN).weights
    how = card_reading(folder, card.preprocessing)
    if onto is None:
        onto = load_backbone(str(card.backbone["name"]), weights)
        if isinstance(how, Preprocess) and preprocessing_of(onto).size != how.size:
            onto = load_backbone(str(card.backbone["name"]), weights, how.size[0])
    return Tuned.from_pretrained(onto, folder)


def card_reading(folder: Path, data: Mapping[str, Any] | None) -> Reading:
    """How items were read that an adapter was trained with."""
    if data is None:
        raise CheckpointError(f"{folder} names no preprocessing: it was not trained by the command line")
    return reading(data)


def versions() -> dict[str, str]:
    """Of what computed the numbers."""
    return {"restuning": __version__, "torch": torch.__version__, "python": platform.python_version()}

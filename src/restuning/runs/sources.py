"""Where a run's examples and models come from: items and a backbone, or a bank."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from restuning.backbones.load import describe_backbone, load_backbone, reading_of
from restuning.data import Items, Prepared, Reading, Task, prepared, reading
from restuning.features.bank import LIMIT, Bank, FromBank, FromFeatures, bytes_per_item, cache_features
from restuning.methods.named import find_method
from restuning.methods.spec import Full, residuals_of, with_components
from restuning.model.tuned import Tuned
from restuning.runs.settings import Run
from restuning.training.evaluate import Examples
from restuning.training.initialise import initialise, needs_data
from restuning.training.shared import components_in, give_shared


class _Prepared(Protocol):
    """Models of a run, and items as they read them."""

    def model(self, train: Items) -> tuple[nn.Module, Tuned]:
        """A newly initialised tuned model, the same at each call; what begins from data begins from `train`."""
        ...

    def read(self, tuned: Tuned, items: Items, augment: bool = False) -> Examples: ...

    def keeps(self) -> bool:
        """Whether a training reads features that were computed once."""
        ...


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
            self.sharded = Tuned(self.backbone, backbone_name=run.backbone, memory=run.memory)
            self.sharded.fully_shard("cuda" if torch.cuda.is_available() else "cpu")

    def model(self, train: Items) -> tuple[nn.Module, Tuned]:
        torch.manual_seed(self.run.training.seed)
        if self.came is not None:
            self.backbone.load_state_dict(self.came)
        tuned = self.sharded or Tuned(self.backbone, backbone_name=self.run.backbone, memory=self.run.memory)
        for name in list(tuned.adapters):  # of the rate before
            tuned.delete_adapter(name)
        _adapted(tuned, self.run, self.whole, self.how)
        if torch.cuda.is_available():
            tuned.cuda()
        if self.run.shared is not None:
            give_shared(tuned.adapter("default"), self.run.shared)
        elif needs_data(tuned):
            initialise(tuned, self._examples(train), self.run.training.seed)
        return (FromFeatures(tuned) if self._keeps(tuned) else tuned), tuned

    def read(self, tuned: Tuned, items: Items, augment: bool = False) -> Examples:
        if augment:
            return prepared(items, self.how, True, self.run.training.seed)
        if not self._keeps(tuned):
            return self._examples(items)
        key = tuple(items.names)
        if key not in self.kept:
            self.kept[key] = cache_features(tuned, self._examples(items), self.run.training.batch_size)
        return self.kept[key]

    def _examples(self, items: Items) -> Examples:
        key = tuple(items.names)
        if key not in self.plain:
            made = prepared(items, self.how)
            if isinstance(made, Prepared):  # it keeps its own pixels, for as long as it is used
                return made
            self.plain[key] = made
        return self.plain[key]

    def keeps(self) -> bool:
        inside = any(part.tuners or part.modules_to_save for part in residuals_of(find_method(self.run.method)))
        return not inside and self._keeps(self.model(self.whole.train)[1])

    def _keeps(self, tuned: Tuned) -> bool:
        if not self.run.keep_features or self.run.augment or not tuned.reads_features or self.whole.kind == "per-token":
            return False
        if self.fits is None:
            whole = self.whole
            items = 2 * len(whole.train) + len(whole.val or ()) + len(whole.test)  # a part of it, and all
            self.fits = bytes_per_item(tuned, self._examples(whole.train)) * items <= LIMIT
        return self.fits


class _FromBank:
    """Rows of a bank; of the backbone no more than its tail is in memory."""

    def __init__(self, run: Run, whole: Task, bank: Bank) -> None:
        self.run, self.whole, self.bank = run, whole, bank
        self.components = bank.components
        self.kept: dict[tuple[str, ...], Examples] = {}

    def model(self, train: Items) -> tuple[nn.Module, Tuned]:
        torch.manual_seed(self.run.training.seed)
        tuned = self.bank.tuned(describe_backbone(self.run.backbone))
        _adapted(tuned, self.run, self.whole, reading(self.bank.preprocessing), self.bank)
        self.bank.accepts(tuned)
        if self.components is not None:
            tuned.adapter("default").set_components(self.components.bases)
        if self.run.shared is not None:
            give_shared(tuned.adapter("default"), self.run.shared, self.components)
        return FromFeatures(tuned), tuned

    def read(self, tuned: Tuned, items: Items, augment: bool = False) -> Examples:
        rows, key = FromBank(self.bank, items), tuple(items.names)
        if self.bank.views > 1 or 2 * self.bank.bytes > LIMIT:  # a part of it, and all
            return rows
        if key not in self.kept:
            self.kept[key] = rows.kept()
        return self.kept[key]

    def keeps(self) -> bool:
        return True


def _adapted(tuned: Tuned, run: Run, whole: Task, how: Reading, bank: Bank | None = None) -> None:
    spec = run.spec(tuned.family)
    if bank is not None and bank.tokens.components is not None:
        spec = bank.fitted(find_method(spec, tuned.family))
    elif run.shared is not None and (count := components_in(run.shared)) is not None:
        spec = with_components(find_method(spec, tuned.family), count)
    tuned.add_adapter(
        "default",
        spec,
        len(whole.classes),
        pool=run.pool,
        classes=whole.classes,
        preprocessing=how.to_dict(),
        kind=whole.kind,
    )


def on_bank(run: Run, whole: Task, bank: Bank) -> Callable[[], FromFeatures]:
    """A maker of the run's newly initialised models, each on what is left of a backbone without its weights."""
    prepared = _FromBank(run, whole, bank)

    def newly_initialised() -> FromFeatures:
        model, _ = prepared.model(whole.train)
        assert isinstance(model, FromFeatures)
        return model

    return newly_initialised

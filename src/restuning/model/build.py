"""Make one adapter for a backbone: checks of what was asked for, its configuration, its modules."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from restuning.backbones.quantised import dtype_of, require_gradient, require_plain
from restuning.data.objective import objective
from restuning.errors import MethodError
from restuning.hooks.fsdp import require_unsharded
from restuning.hooks.tail import tail_of
from restuning.methods.files import to_dict
from restuning.methods.named import find_method
from restuning.methods.spec import Full, Method, grid_of, reads_all_tokens, residuals_of, side_of
from restuning.model.adapter import AdapterModule, Reader
from restuning.model.files import AdapterConfig, check_config
from restuning.model.merge import require_unmerged

if TYPE_CHECKING:
    from restuning.model.collection import AdapterCollection


@dataclass(frozen=True)
class Head:
    """What an adapter's head is for.

    Args:
        num_classes: its outputs; under regression, the number of targets; None: there is no head.
        kind: of task: `single-label`, `multi-label`, `regression` or `per-token`.
        pool: what it reads; None: as the backbone pools.
        classes: names of its outputs.

    Raises:
        MethodError: fewer than one class, or another number of names.
        RestuningError: an unknown kind.
    """

    num_classes: int | None = None
    kind: str = "single-label"
    pool: str | None = None
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_classes is not None and self.num_classes < 1:
            raise MethodError(f"num_classes={self.num_classes}: expected at least 1")
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise MethodError(f"{len(self.classes)} class names for num_classes={self.num_classes}")
        objective(self.kind)

    @classmethod
    def of(
        cls, num_classes: int | None, kind: str = "single-label", pool: str | None = None, classes: Any = None
    ) -> "Head":
        """From arguments as a user gives them: names alone tell how many there are; numpy's numbers are numbers."""
        names = None if classes is None else tuple(c.item() if hasattr(c, "item") else c for c in classes)
        count = len(names) if num_classes is None and names is not None else num_classes
        return cls(None if count is None else int(count), kind, pool, names)


def build_adapter(
    tuned: "AdapterCollection",
    name: str,
    method: str | Method,
    head: Head,
    preprocessing: Mapping[str, Any] | None,
    autocast_adapter_dtype: bool = True,
) -> tuple[AdapterModule, Reader]:
    """The modules of a new adapter, on the backbone's device and in its precision, float32 at least.

    Args:
        tuned: the backbone and its other adapters.
        name: of the new one.
        method: by name, or as it is.
        head: its outputs.
        preprocessing: of its items, as plain data.
        autocast_adapter_dtype: False: in half precision on a backbone in half precision.

    Raises:
        MethodError, SiteError: see `Tuned.add_adapter`.
    """
    if name in tuned.adapters:
        raise MethodError(f"there is an adapter named {name!r} already: delete it first, or choose another name")
    if not re.fullmatch(r"\w[\w-]*", name) or hasattr(tuned.adapters, name):
        raise MethodError(f"an adapter cannot be named {name!r}: use letters, digits, '_' and '-'")
    spec, sites = find_method(method, tuned.family), tuned.sites
    pool = _pool(spec, head, sites.pool)
    side = side_of(spec)
    if isinstance(spec, Full):
        require_unsharded(tuned.shards, "full fine-tuning")
        for p in tuned.backbone.parameters():
            require_plain(p, "full fine-tuning")
    if side is not None and side.needs_weights:
        require_unsharded(tuned.shards, "a side network that begins from them")
    if any(part.modules_to_save for part in residuals_of(spec)):
        require_unsharded(tuned.shards, "a trained copy of a module")
    require_unmerged(tuned.backbone, "another adapter")
    if (isinstance(spec, Full) and len(tuned.adapters)) or any(tuned.adapter(n).full for n in tuned.adapters):
        raise MethodError("full fine-tuning changes the backbone itself, so it cannot share it with other adapters")
    tail = tail_of(tuned.backbone, sites, pool if grid_of(spec) is None else "flat")
    config = AdapterConfig(
        method=method if isinstance(method, str) else None,
        spec=to_dict(spec),
        backbone=tuned.describe(),
        pool=tail.pool,
        num_classes=head.num_classes,
        classes=head.classes,
        preprocessing=None if preprocessing is None else dict(preprocessing),
        kind=head.kind,
    )
    check_config(config)
    like = next(tuned.backbone.parameters(), torch.empty(0))
    with torch.device(tuned.made_on or like.device):
        adapter = AdapterModule(tuned.backbone, sites, spec, tail.pool, head.num_classes, config)
    if adapter.inside:
        require_gradient(tuned.backbone, "a tuner inside the backbone")
    own = dtype_of(tuned.backbone)
    adapter.cast(torch.promote_types(own, torch.float32) if autocast_adapter_dtype else own)
    return adapter, Reader(adapter, tuned.backbone, sites, tail)


def _pool(spec: Method, head: Head, own: str) -> str | None:
    """The pooling that is meant. Raises MethodError for one that a kind of task or a method cannot have."""
    if reads_all_tokens(spec) and (head.kind == "per-token" or head.pool not in (None, own)):
        what = "labels per token" if head.kind == "per-token" else f"pool={head.pool!r}"
        raise MethodError(
            f"{what}: this method reads every layer in a way of its own, one vector for each example; res-tuning "
            "has one for each token"
        )
    if head.kind != "per-token":
        return head.pool
    if grid_of(spec) is not None or head.pool not in (None, "none"):
        raise MethodError("labels per token need every token: no grid, and no pooling but none")
    return "none"


def loss_and_logits(logits: Any, labels: torch.Tensor, configs: Sequence[AdapterConfig]) -> dict[str, torch.Tensor]:
    """A dict of `loss` and `logits`, as `transformers.Trainer` expects.

    Args:
        logits: of one adapter, or of a mixed batch.
        labels: (b,), or as the kind of task has them.
        configs: of the adapters that have a part in it.

    Raises:
        MethodError: several adapters at once, several kinds of task, or outputs that are padded with −inf.
    """
    if not isinstance(logits, torch.Tensor):
        raise MethodError("labels= needs one active adapter")
    kinds = {config.kind for config in configs}
    if len(kinds) > 1:
        raise MethodError(f"labels= for adapters of several kinds of task ({', '.join(sorted(kinds))})")
    if kinds & {"multi-label", "regression"} and len({config.num_classes for config in configs}) > 1:
        raise MethodError(f"labels= for {kinds.pop()} adapters of several widths: a row would be padded with −inf")
    return {"loss": objective(kinds.pop() if kinds else "single-label").loss(logits, labels), "logits": logits}

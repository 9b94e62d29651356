"""What rows of several families share: poolings, numbers of prefix tokens, names of modules."""

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

TIMM_POOLS = {"token": "cls", "avg": "mean", "fast": "mean", "fastavg": "mean", "": "none"}


def pool_type(module: str) -> Callable[[Any], str]:
    """The pooling that a timm pooling module says of itself."""
    return partial(_pool_said, module)


def _pool_said(module: str, root: Any) -> str:
    kind = attrgetter(f"{module}.pool_type")(root)
    return TIMM_POOLS.get(kind, str(kind))


def mean(_: Any) -> str:
    return "mean"


def none(_: Any) -> str:
    return "none"


def last(_: Any) -> str:
    return "last"


def zero(_: Any) -> int:
    return 0


HF_PARTS = {
    "qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "proj": ("attention.o_proj",),
    "fc1": ("mlp.fc1", "mlp.weights_in"),
    "fc2": ("mlp.fc2", "mlp.weights_out"),
}
HF_4_ATTENTION = {
    "qkv": ("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    "proj": ("attention.output.dense",),
}
MAPS: dict[str, Any] = {"prefix": zero, "grid": True}

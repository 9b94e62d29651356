"""Table 7 as data: a method says which tuner goes to which operation, or runs beside the backbone."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeAlias

from torch import nn

from restuning._types import Recipe
from restuning.errors import MethodError
from restuning.tuners import Adapter, Prefix, Prompt


def _check_recipe(where: str, recipe: Any) -> None:
    if not callable(recipe):
        raise MethodError(f"{where} is {recipe!r}: expected a recipe such as restuning.Adapter(10), or a module class")
    if isinstance(recipe, nn.Module):
        raise MethodError(
            f"{where} is a {type(recipe).__name__} module, already built: pass its class, "
            "or a function port → module, so that every block gets its own"
        )


@dataclass(frozen=True)
class Residual:
    """OP(x) + tuner(x, OP(x)) (Eq. 7): operation (`mha`, `ffn`, `block`) → recipe of a tuner.

    blocks: the blocks that carry tuners, counted from 0; None: all. No tuners at all is linear probing.
    """

    tuners: Mapping[str, Recipe] = field(default_factory=dict)
    blocks: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for op, recipe in self.tuners.items():
            _check_recipe(f"Residual: the tuner of {op!r}", recipe)


@dataclass(frozen=True)
class Bypass:
    """Res-Tuning-Bypass (Eq. 8): recipes of the horizontal and the vertical tuners; None is an identity tuner.

    blocks: the blocks that carry tuners, counted from 0; None: all. Every block keeps its λ.
    """

    horizontal: Recipe | None = None
    vertical: Recipe | None = None
    blocks: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for side in ("horizontal", "vertical"):
            if getattr(self, side) is not None:
                _check_recipe(f"Bypass: the {side} tuner", getattr(self, side))


@dataclass(frozen=True)
class Full:
    """Full fine-tuning: every parameter of the backbone is trained."""


Method: TypeAlias = Residual | Bypass | Full

methods: dict[str, Method] = {
    "full": Full(),
    "linear": Residual(),
    "res-tuning-single": Residual({"ffn": Prompt(10)}),
    "res-tuning": Residual({"mha": Adapter(10, scale="channel"), "ffn": Adapter(10, scale="channel")}),
    "res-tuning-tri": Residual(
        {"mha": Adapter(10, scale="channel"), "ffn": Adapter(10, scale="channel"), "block": Adapter(10)}
    ),
    "bypass-none": Bypass(),
    "bypass-horizontal": Bypass(horizontal=Adapter(10)),
    "bypass-vertical": Bypass(vertical=Adapter(10)),
    "bypass": Bypass(horizontal=Adapter(10), vertical=Adapter(10)),
}
"""The named methods of the paper; add your own like to any dict."""

ABOUT: dict[str, str] = {
    "full": "every parameter of the backbone",
    "linear": "the head alone (linear probing)",
    "res-tuning-single": "Table 3a: Res-Prompt on the FFN",
    "res-tuning": "Table 3a, dual: Res-Adapters on MHA and FFN",
    "res-tuning-tri": "Table 3a: Res-Adapters on MHA, FFN and Block",
    "bypass-none": "Table 3b: Eq. 8 with identity tuners, learned λ",
    "bypass-horizontal": "Table 3b: Eq. 8, horizontal Res-Adapters",
    "bypass-vertical": "Table 3b: Eq. 8, vertical Res-Adapters",
    "bypass": "Table 3b: Eq. 8, horizontal and vertical Res-Adapters (Res-Tuning-Bypass)",
}

TUNERS: dict[str, type] = {cls.__name__.lower(): cls for cls in (Adapter, Prefix, Prompt)}


def find_method(method: str | Method) -> Method:
    """A method by name, or as it is. Raises MethodError with the nearest names."""
    if isinstance(method, Residual | Bypass | Full):
        return method
    if method not in methods:
        near = difflib.get_close_matches(str(method), methods, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise MethodError(f"unknown method {method!r}{hint}: expected one of {', '.join(methods)}, or a method object")
    return methods[method]


def resize(method: Method, size: int) -> Method:
    """The same method with every tuner of this width or of this many tokens (Table 13)."""

    def sized(recipe: Recipe) -> Recipe:
        if isinstance(recipe, Adapter):
            return replace(recipe, width=size)
        return replace(recipe, tokens=size) if isinstance(recipe, Prefix | Prompt) else recipe

    if isinstance(method, Residual):
        return replace(method, tuners={op: sized(recipe) for op, recipe in method.tuners.items()})
    if isinstance(method, Bypass):
        h, v = method.horizontal, method.vertical
        return replace(method, horizontal=h and sized(h), vertical=v and sized(v))
    return method


def on_blocks(method: Method, blocks: Sequence[int]) -> Method:
    """The same method with tuners in these blocks only (Tables 14 and 15)."""
    return method if isinstance(method, Full) else replace(method, blocks=tuple(blocks))


def to_dict(method: Method) -> dict[str, Any]:
    """A method as plain data, for JSON. An own tuner is recorded by its name alone."""
    kind = type(method).__name__.lower()
    if isinstance(method, Full):
        return {"kind": kind}
    blocks = None if method.blocks is None else list(method.blocks)
    if isinstance(method, Residual):
        return {"kind": kind, "tuners": {op: _recipe(r) for op, r in method.tuners.items()}, "blocks": blocks}
    return {
        "kind": kind,
        "horizontal": _recipe(method.horizontal),
        "vertical": _recipe(method.vertical),
        "blocks": blocks,
    }


def from_dict(data: Mapping[str, Any]) -> Method:
    """The inverse of `to_dict`. Raises MethodError for unknown kinds and for own tuners, which no file can hold."""
    kind = data.get("kind")
    try:
        blocks = None if data.get("blocks") is None else tuple(data["blocks"])
        if kind == "full":
            return Full()
        if kind == "residual":
            return Residual({op: _build(r) for op, r in data["tuners"].items()}, blocks)  # type: ignore[misc]
        if kind == "bypass":
            return Bypass(_build(data["horizontal"]), _build(data["vertical"]), blocks)
    except (KeyError, TypeError, AttributeError) as error:
        raise MethodError(f"a method of kind {kind!r} that cannot be read: {error}") from error
    raise MethodError(f"unknown kind of method {kind!r}: expected full, residual or bypass")


def _recipe(recipe: Recipe | None) -> dict[str, Any] | None:
    if recipe is None:
        return None
    name = type(recipe).__name__.lower()
    if TUNERS.get(name) is type(recipe):
        return {"tuner": name, **asdict(recipe)}  # type: ignore[call-overload]
    return {"own": f"{getattr(recipe, '__module__', '?')}.{getattr(recipe, '__qualname__', type(recipe).__qualname__)}"}


def _build(data: Mapping[str, Any] | None) -> Recipe | None:
    if data is None:
        return None
    if "own" in data:
        raise MethodError(f"this method has an own tuner, {data['own']}: pass method= with the same tuner")
    if data["tuner"] not in TUNERS:
        raise MethodError(f"unknown tuner {data['tuner']!r}: expected one of {', '.join(TUNERS)}")
    cls = TUNERS[data["tuner"]]
    known = {f.name for f in fields(cls)}
    unknown = set(data) - known - {"tuner"}
    if unknown:
        raise MethodError(f"unknown settings of {data['tuner']}: {', '.join(sorted(unknown))}")
    return cls(**{k: v for k, v in data.items() if k in known})  # type: ignore[no-any-return]

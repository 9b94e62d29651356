"""Backbones whose weights are quantised, by torchao, bitsandbytes or optimum-quanto: what is told of them, and how one
is made of a float backbone."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from restuning.errors import MethodError, MissingExtra, RestuningError
from restuning.utils.profiling import parts


def is_quantised(tensor: Tensor) -> bool:
    """Whether a weight is no plain floating-point tensor: whole numbers, or a subclass that holds such."""
    plain = type(tensor) in (Tensor, nn.Parameter) or type(tensor.data) is Tensor
    return not tensor.is_floating_point() or not (plain or hasattr(tensor, "device_mesh"))


def require_plain(tensor: Tensor, what: str) -> None:
    """Raises MethodError for a quantised weight."""
    if is_quantised(tensor):
        raise MethodError(f"{what} needs the backbone's own weights in floating point, and these are quantised")


_PACKS = "support_avx512bf16_for_cpu"
"""Of bitsandbytes' 4-bit maps: whether a forward in eval mode packs the weight for a kernel that has no gradient."""


def require_gradient(backbone: nn.Module, what: str) -> None:
    """Raises MethodError for a quantised backbone through which no gradient goes."""
    for path, module in backbone.named_modules():
        if getattr(module, _PACKS, False) and next(module.parameters()).device.type == "cpu":
            raise MethodError(
                f"{what} needs a gradient through {path}, which bitsandbytes packs for inference on this CPU: set its "
                f"{_PACKS} = False before any forward, or train a side path"
            )


def dtype_of(backbone: nn.Module) -> torch.dtype:
    """What a backbone computes in: the type of its first floating-point parameter."""
    return next((p.dtype for p in backbone.parameters() if p.is_floating_point()), torch.get_default_dtype())


def bytes_of(model: nn.Module) -> int:
    """The bytes of a model's parameters, scales and tables of quantised ones among them."""
    return sum(_bytes(p) for p in {id(p): p for p in model.parameters()}.values())


def _bytes(tensor: Any) -> int:
    held = [*parts(tensor), getattr(tensor, "SCB", None), *_tables(getattr(tensor, "quant_state", None))]
    return sum(t.nbytes for t in held if isinstance(t, Tensor))


def _tables(state: Any) -> Iterator[Any]:
    """The scales of bitsandbytes' 4-bit weights, which may be quantised themselves."""
    while state is not None:
        yield from (state.absmax, state.code)
        state = getattr(state, "state2", None)


def quantise(backbone: nn.Module, kind: str) -> nn.Module:
    """The backbone with the linear maps of its blocks and elsewhere quantised, in place.

    Args:
        backbone: in float32 or bfloat16, frozen.
        kind: one of `KINDS`.

    Raises:
        RestuningError: an unknown kind.
        MissingExtra: its library is not installed.
    """
    if kind not in KINDS:
        raise RestuningError(f"quantise {kind!r}: expected one of {', '.join(KINDS)}")
    try:
        return KINDS[kind](backbone.requires_grad_(False)).eval()
    except ImportError as error:
        raise MissingExtra(kind.partition("-")[0], "quantised") from error


def _torchao(config: str, **settings: Any) -> Callable[[nn.Module], nn.Module]:
    def run(backbone: nn.Module) -> nn.Module:
        from torchao import quantization

        quantization.quantize_(backbone, getattr(quantization, config)(**settings))
        return backbone

    return run


def _torchao_int4(backbone: nn.Module) -> nn.Module:
    from torchao.quantization.granularity import PerGroup

    types: Any = torch  # whose stubs lack int4
    return _torchao("IntxWeightOnlyConfig", weight_dtype=types.int4, granularity=PerGroup(32))(backbone)


def _bitsandbytes(bits: int) -> Callable[[nn.Module], nn.Module]:
    def run(backbone: nn.Module) -> nn.Module:
        import bitsandbytes as bnb

        for path, module in list(backbone.named_modules()):
            if type(module) is not nn.Linear:
                continue
            shape, bias, dtype = (module.in_features, module.out_features), module.bias is not None, module.weight.dtype
            own: Any
            if bits == 8:
                own = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False)
            else:
                own = bnb.nn.Linear4bit(*shape, bias=bias, compute_dtype=dtype, quant_type="nf4")
                setattr(own, _PACKS, False)
            own.load_state_dict(module.state_dict())
            owner, _, name = path.rpartition(".")
            setattr(backbone.get_submodule(owner), name, own.to(module.weight.device))  # which quantises it
        return backbone.requires_grad_(False)

    return run


def _quanto(backbone: nn.Module) -> nn.Module:
    from optimum import quanto

    quanto.quantize(backbone, weights=quanto.qint8)
    quanto.freeze(backbone)
    return backbone.requires_grad_(False)


KINDS: Mapping[str, Callable[[nn.Module], nn.Module]] = {
    "torchao-int8": _torchao("Int8WeightOnlyConfig"),
    "torchao-int4": _torchao_int4,
    "bitsandbytes-int8": _bitsandbytes(8),
    "bitsandbytes-nf4": _bitsandbytes(4),
    "quanto-int8": _quanto,
}
"""How the weights of linear maps can be quantised, by library and type."""

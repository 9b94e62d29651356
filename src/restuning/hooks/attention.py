"""The attention's inside: softmax(QKᵀ)V seen while a module calls it, and prefixes merged into it exactly."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from restuning.errors import SiteError

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """One call of Attn(Q, K, V) (Res-Tuning, Eq. 1): q (b, h, n, e), k and v (b, h, m, e); `mask` is added to the
    scores, or boolean (True: attended to), and broadcasts to (b, h, n, m). `output` and `lse` where eager arithmetic
    has them already: the output (b, h, n, e) and log Z = log Σ exp(scores) (b, h, n)."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    scale: float
    output: Tensor | None = None
    lse: Tensor | None = None


Piece = tuple[Tensor, Tensor]
"""More keys and values (h, p, e) or (b, h, p, e) for the same queries."""


def merged(call: Call, pieces: Sequence[Piece], fast: bool = True) -> Tensor:
    """Attn(Q, [K; K_1; …], [V; V_1; …]) without ever putting them together (Res-Tuning, Eq. 3, 9 and 10).

    Equal to the bound form, forward and gradients. The fast path takes output and log-sum-exp from the attention
    kernel; plain arithmetic is the reference, and what eager attention gets.
    """
    if has_torch_function((call.q,)):  # for modes, to which it is one operation
        out: Tensor = handle_torch_function(merged, (call.q,), call, pieces, fast)
        return out
    if not pieces and call.output is not None:
        return call.output
    if not pieces:
        return F.scaled_dot_product_attention(
            call.q, call.k, call.v, call.mask, is_causal=call.causal, scale=call.scale
        )
    for k, _ in pieces:
        if (k.shape[-3], k.shape[-1]) != (call.q.shape[1], call.q.shape[-1]):
            raise SiteError(
                f"the attention has {call.q.shape[1]} heads of {call.q.shape[-1]}, and not {k.shape[-3]} of "
                f"{k.shape[-1]}: a prefix of another shape cannot be merged"
            )
    if fast and call.output is None and _kernel(call):
        # in the queries' precision: autocast is over when the backward pass comes
        k, v = (torch.cat([_batched(t, call.q) for t in side], -2).to(call.q) for side in zip(*pieces, strict=True))
        mask = call.mask if call.mask is None or call.mask.is_floating_point() else _additive(call.mask, call.q)
        return _Merge.apply(call.q, call.k, call.v, mask, call.causal, call.scale, k, v)  # type: ignore[no-any-return, no-untyped-call]
    if call.output is None or call.lse is None:
        y, lse = plain(call.q, call.k, call.v, _full_mask(call), call.scale)
    else:
        y, lse = call.output, call.lse
    for k, v in ([_batched(t, call.q) if t.ndim == 4 else t for t in piece] for piece in pieces):
        h, lse_more = plain(call.q, k, v, None, call.scale)
        weight = torch.sigmoid(lse_more - lse)  # λ = Z_pre / (Z + Z_pre)
        y = y + weight.unsqueeze(-1).to(y.dtype) * (h - y)
        lse = torch.logaddexp(lse, lse_more)
    return y


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attn(Q, K, V) and its log-sum-exp (b, h, n), written out; log-sum-exp in float32 at least."""
    scores = q @ k.transpose(-2, -1) * scale
    if mask is not None:
        scores = scores + (mask if mask.is_floating_point() else _additive(mask, q))
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    return wide.softmax(-1).to(q.dtype) @ v, wide.logsumexp(-1)


class _Merge(torch.autograd.Function):
    """The merge over the kernel's own log-sum-exp.

    Backward is the kernel's, given the merged output and the joint log-sum-exp: with them its probabilities
    exp(score − LSE) and its rowsum(dO ∘ O) are those of the bound form, for the backbone's keys and for the others.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        more_k: Tensor,
        more_v: Tensor,
    ) -> Tensor:
        # of tensors whose last dimension is not the innermost the kernels give wrong values, without a word
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        y, lse = _forward_kernel(q, k, v, mask, causal, scale)
        h, lse_more = plain(q, more_k, more_v, None, scale)
        y = y.lerp_(h, torch.sigmoid(lse_more - lse).unsqueeze(-1).to(y.dtype))
        joint = torch.logaddexp(lse, lse_more.to(lse.dtype))
        ctx.save_for_backward(q, k, v, mask, more_k, more_v, y, joint)
        ctx.causal, ctx.scale = causal, scale
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (dy,) = grads
        q, k, v, mask, more_k, more_v, y, joint = ctx.saved_tensors
        dq = dk = dv = dk_more = dv_more = None
        p = torch.exp(q @ more_k.transpose(-2, -1) * ctx.scale - joint.unsqueeze(-1)).to(q.dtype)
        row = (dy * y).sum(-1, keepdim=True)
        ds = p * (dy @ more_v.transpose(-2, -1) - row) * ctx.scale
        if ctx.needs_input_grad[6]:
            dk_more = ds.transpose(-2, -1) @ q
        if ctx.needs_input_grad[7]:
            dv_more = p.transpose(-2, -1) @ dy
        if any(ctx.needs_input_grad[:3]):
            dq, dk, dv = _backward_kernel(dy, q, k, v, mask, y, joint, ctx.causal, ctx.scale)
            dq = dq + ds @ more_k
        return dq, dk, dv, None, None, None, dk_more, dv_more


def _kernel(call: Call) -> bool:
    """Whether a kernel is there that gives and takes a log-sum-exp, and may be used: no graph to be read elsewhere is
    being made."""
    if torch.compiler.is_exporting():
        return False
    same = call.q.shape[:2] == call.k.shape[:2] and call.q.shape[-1] == call.v.shape[-1]
    if call.q.device.type == "cpu":
        return same
    return same and call.q.device.type == "cuda" and call.mask is None and call.q.dtype != torch.float64


def _forward_kernel(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        y, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        return y, lse
    y, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return y, lse[..., : q.shape[-2]]  # padded to whole tiles


def _backward_kernel(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    y: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dy, q, k, v, y, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
        return dq, dk, dv
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dy, q, k, v, None, y, lse, seed, seed, 0.0, [True, True, True, False], causal, scale=scale
    )
    return dq, dk, dv


def _batched(t: Tensor, q: Tensor) -> Tensor:
    """For every row of q; rows of a batch that come as several windows have the same in each."""
    rows = q.shape[0]  # not len(): it would fix the batch of a graph that is traced
    return t.repeat_interleave(rows // t.shape[0], 0) if t.ndim == 4 else t.expand(rows, *t.shape)


def _additive(mask: Tensor, q: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, -torch.inf)


def _autocast(t: Tensor) -> Tensor:
    """As autocast gives it to the fused attention: rotary positions and norms have left other precisions."""
    on = torch.is_autocast_enabled(t.device.type) and t.is_floating_point() and t.dtype != torch.float64
    return t.to(torch.get_autocast_dtype(t.device.type)) if on else t


def _full_mask(call: Call) -> Tensor | None:
    if not call.causal:
        return call.mask
    return torch.ones(call.q.shape[-2], call.k.shape[-2], dtype=torch.bool, device=call.q.device).tril()


class _Seen(TorchFunctionMode):
    """Finds the attention call among a module's torch calls, fused or written out, and puts another output in its
    place. Written out it is: scores = Q @ Kᵀ, times or plus what follows, softmax, dropout, @ V."""

    def __init__(self, change: Callable[[Call], Tensor]) -> None:
        super().__init__()
        self.change, self.found = change, False
        self.q = self.k = self.scores = self.lse = self.weights = self.mask = None  # type: Tensor | None
        self.scale = 1.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return opened(*args, **kwargs)
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if self.weights is not None and first is self.weights and name == "matmul":
            assert self.q is not None and self.k is not None
            output = func(*args, **kwargs)
            return self._one(Call(self.q, self.k, args[1], self.mask, False, self.scale, output, self.lse))
        out = func(*args, **kwargs)
        if not (isinstance(out, Tensor) and isinstance(first, Tensor) and first.ndim in (4, 5)):
            return out
        if name == "matmul" and self.scores is None and first.ndim == 4 and not self.found:
            self.q, self.k, self.scores = first, args[1].transpose(-2, -1), out
        elif self.scores is not None and first is self.scores:
            self._follow(name, args, out)
        elif self.weights is not None and first is self.weights and out.shape == first.shape:
            self.weights = out
        return out

    def _follow(self, name: str, args: Any, out: Tensor) -> None:
        if name == "tanh":
            raise SiteError("the attention's scores are capped: a prefix cannot be merged exactly")
        if name == "softmax":
            scores = args[0]
            self.lse = (scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores).logsumexp(-1)
            self.weights, self.scores = out, None
        elif out.shape == args[0].shape or name == "view":  # windows take their masks in five dimensions
            if len(args) > 1 and isinstance(args[1], (int, float)) and args[1]:
                self.scale *= {"mul": args[1], "mul_": args[1], "div": 1 / args[1], "div_": 1 / args[1]}.get(name, 1.0)
            elif len(args) > 1 and isinstance(args[1], Tensor) and name in ("add", "add_"):
                self.mask = args[1]
            self.scores = out

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p:
            raise SiteError("attention dropout is on: a prefix cannot be merged exactly; use train_mode=False")
        query, key, value = map(_autocast, (query, key, value))
        attn_mask = None if attn_mask is None else _autocast(attn_mask)
        if enable_gqa:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return self._one(Call(query, key, value, attn_mask, is_causal, scale))

    def _one(self, call: Call) -> Tensor:
        self.found, self.weights = True, None
        return self.change(call)


def opened(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    width: int,
    heads: int,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    zero: bool,
    dropout: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    **rest: Any,
) -> tuple[Tensor, None]:
    """`F.multi_head_attention_forward` (n, b, d) in calls that a mode can see: two affine maps, and the attention.

    is_causal is no more than a hint of what attn_mask is. Raises SiteError for what nn.MultiheadAttention seldom has.
    """
    if in_weight is None or bias_k is not None or zero or query.ndim != 3 or need_weights:
        raise SiteError(
            "nn.MultiheadAttention with weights that are returned (need_weights=True), unbatched, or with bias_k, "
            "add_zero_attn, kdim or vdim: nothing can be put inside it"
        )

    def split(x: Tensor) -> tuple[Tensor, ...]:
        parts = F.linear(x.transpose(0, 1), in_weight, in_bias).chunk(3, -1)
        return tuple(part.reshape(*part.shape[:2], heads, -1).transpose(1, 2) for part in parts)

    q, k, v = split(query)
    if key is not query:
        k, v = split(key)[1:]
    if value is not key:
        v = split(value)[2]
    masks = [_added(m, q) for m in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None])]
    if masks[0] is not None and masks[0].ndim == 3:
        masks[0] = masks[0].view(-1, heads, *masks[0].shape[1:])
    there = [m for m in masks if m is not None]
    mask = sum(there[1:], there[0]) if there else None
    output = F.scaled_dot_product_attention(q, k, v, mask, dropout if training else 0.0)
    return F.linear(output.transpose(1, 2).flatten(2), out_weight, out_bias).transpose(0, 1), None


def _added(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """nn.MultiheadAttention's masks are True where nothing is attended to, or are added to the scores."""
    return _additive(~mask, q) if mask is not None and mask.dtype == torch.bool else mask


class _Mapped(TorchFunctionMode):
    """Finds the calls of F.linear that are given one weight, and puts another output in its place."""

    def __init__(self, weight: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.change, self.found = weight, change, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            with self:
                return opened(*args, **kwargs)
        out = func(*args, **kwargs)
        if func is not F.linear or (args[1] if len(args) > 1 else kwargs["weight"]) is not self.weight:
            return out
        self.found = True
        return self.change(args[0] if args else kwargs["input"], out)


Mode = TypeVar("Mode", _Seen, _Mapped)


def on_call(
    module: nn.Module, change: Callable[[Call], Tensor], always: Callable[[], bool] = lambda: True
) -> AbstractContextManager[None]:
    """While it lasts, `change` gives the output of the attention call inside every forward of `module`."""
    return _inside(
        module, lambda: _Seen(change), "no attention call that is known: fused, or matmul and softmax", always
    )


def on_weight(
    module: nn.Module,
    weight: Callable[[], Tensor],
    change: Callable[[Tensor, Tensor], Tensor],
    always: Callable[[], bool] = lambda: True,
) -> AbstractContextManager[None]:
    """While it lasts, `change(x, y)` gives the output of F.linear, inside every forward of `module`, where it is
    called with `weight()`."""
    return _inside(
        module, lambda: _Mapped(weight(), change), "no call of F.linear with the weight that is tuned", always
    )


@contextmanager
def _inside(module: nn.Module, made: Callable[[], Mode], missing: str, always: Callable[[], bool]) -> Iterator[None]:
    """While it lasts, every forward of `module` runs in a mode of its own.

    always: whether a forward that is left by an exception may be followed by others; torch.compile takes it for False.
    """
    running: list[tuple[Mode, ExitStack]] = []

    def before(m: nn.Module, args: Any) -> None:
        mode, stack = made(), ExitStack()
        stack.enter_context(mode)
        running.append((mode, stack))

    def after(m: nn.Module, args: Any, out: Any) -> None:
        mode, stack = running.pop()
        stack.close()
        if out is not None and not mode.found:
            raise SiteError(f"{type(m).__name__} makes {missing}")

    handles = (
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, always_call=always()),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for _, stack in reversed(running):
            stack.close()

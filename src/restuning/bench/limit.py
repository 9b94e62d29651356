"""What an exact method must keep for backward, if it computes nothing twice."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

NORMS = ("NativeLayerNorm", "NativeGroupNorm")
FIXED = ("NativeBatchNorm", "CudnnBatchNorm")
"""Of fixed statistics, as in a frozen backbone: a scale and a shift, whose derivative needs no tensor of a batch."""


def least_bytes(run: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that the derivatives of a loss are functions of, each storage once. Of a norm its output, which its reader
    may need too, and its deviations, in place of its input; of a frozen linear map, convolution or batch norm nothing;
    of a trained one its input; of an activation its input; of attention queries, keys, values, output and the sums of
    its softmax. Of what is composed of other operations (a norm written out, say), what torch keeps of these.

    Args:
        run: gives the loss, by torch's own operations: `memory="plain"`.
        model: whose parameters and buffers are left out, since they are there anyway.
    """
    outputs: list[Tensor] = []  # held, so that no other tensor takes their place
    hooks = [
        module.register_forward_hook(lambda _, __, out: outputs.append(out))
        for module in model.modules()
        if isinstance(module, nn.LayerNorm | nn.GroupNorm)
    ]
    try:
        loss = run()
    finally:
        for hook in hooks:
            hook.remove()
    out_of = {out.grad_fn: out for out in outputs}
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    for node in _nodes(loss.grad_fn):
        kind = node.name().rstrip("0123456789").removesuffix("Backward")
        for name, x in _saved(node):
            if kind in FIXED or (kind in NORMS and name in ("input", "result1") and node not in out_of):
                continue
            if kind in NORMS and name in ("input", "result1"):
                x = out_of[node]
            if kind == "Convolution" and name == "input" and node.next_functions[1][0] is None:
                continue
            storage = x.untyped_storage()
            if storage.data_ptr() not in there:
                kept[storage.data_ptr()] = storage.nbytes()
    return sum(kept.values())


def _nodes(root: Any) -> Iterator[Any]:
    seen, left = {root}, [root]
    while left:
        node = left.pop()
        yield node
        new = {following for following, _ in node.next_functions} - seen - {None}
        seen |= new
        left += new


def _saved(node: Any) -> Iterator[tuple[str, Tensor]]:
    for name in dir(node):
        if name.startswith("_saved_") and isinstance(x := getattr(node, name), Tensor):
            yield name.removeprefix("_saved_"), x

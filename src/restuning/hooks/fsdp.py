"""A frozen backbone's blocks shared out over processes (FSDP2): each process holds a part of every weight, and all of
one block while that runs."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from restuning.errors import MethodError, RestuningError

_NEEDS = "the backbone's blocks are shared out over processes, and {} needs the whole of them: call unshard() first"


def require_unsharded(shards: "Shards | None", what: str) -> None:
    """Raises MethodError where there are none."""
    if shards is not None:
        raise MethodError(_NEEDS.format(what))


def sharded_parameters(module: nn.Module) -> list[str]:
    """The names of the parameters of which this process holds a share."""
    if not torch.distributed.is_available():
        return []
    from torch.distributed.tensor import DTensor

    return [name for name, p in module.named_parameters() if isinstance(p, DTensor)]


class Shards:
    """What was done to a backbone so that it is shared out, and undoes it.

    Each block is gathered as it begins and given back as it ends, forward and backward; the backbone's own call,
    the root, lets the next one come while one runs. What belongs to no block, or to several, stays whole everywhere.
    """

    def __init__(self, backbone: nn.Module, blocks: Iterable[str], device: torch.device | str) -> None:
        """All processes have the same weights, and call this together. device: the kind of device that shares go to."""
        dist = torch.distributed
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            raise RestuningError("one process alone has nobody to share with: start several, by accelerate launch")
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        modules = list(dict.fromkeys(backbone.get_submodule(path) for path in blocks))
        owners = Counter(p for own in (*(set(m.parameters()) for m in modules), _rest(backbone, modules)) for p in own)
        mine = {p for m in modules for p in m.parameters() if owners[p] == 1 and p.ndim and p.is_contiguous()}
        if any(p.requires_grad for p in mine):
            raise MethodError("only frozen weights are shared out, and these are trained")
        self._backbone, self._shared = backbone, [backbone, *modules]
        self._classes = [type(m) for m in self._shared]
        self._were = {name: p for name, p in backbone.named_parameters(remove_duplicate=False) if p in mine}
        before = {m: set(vars(m)) for m in backbone.modules()}
        mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
        for module in (*modules, backbone):
            ignored = {p for p in module.parameters() if p not in mine or module is backbone}
            fully_shard(module, mesh=mesh, ignored_params=ignored)
        self._added = [(m, key) for m in backbone.modules() for key in set(vars(m)) - before[m]]
        for p in mine:  # the parameter itself is kept, to be given back; its memory is not
            p.data = p.data.new_empty(0)
        self._after = backbone.register_forward_hook(self._forget)

    def unshard(self) -> None:
        """Every process has all weights again, where its shares were, in the backbone as it came. All call it together.

        What users put on the backbone meanwhile stays there.
        """
        from torch.distributed._composable_state import _module_state_mapping

        self._after.remove()
        for module in reversed(self._shared):
            module.reshard()  # type: ignore[operator]
        parts: dict[nn.Parameter, Any] = {p: self._backbone.get_parameter(name) for name, p in self._were.items()}
        for p, part in parts.items():
            p.data = part.detach().full_tensor()
        for name, p in self._were.items():
            path, _, key = name.rpartition(".")
            self._backbone.get_submodule(path)._parameters[key] = p
        for module, key in self._added:
            delattr(module, key)
        for module in self._backbone.modules():
            _drop_hooks(module)
        for module, came in zip(self._shared, self._classes, strict=True):
            module.__class__ = came
            _module_state_mapping.pop(module, None)  # else it could not be shared out again

    def _forget(self, *_: Any) -> None:
        """FSDP notes the order of blocks for a backward pass; where none comes, these notes would grow for ever."""
        if torch.is_grad_enabled():
            return
        for module in self._shared:
            state = module._get_fsdp_state()  # type: ignore[operator]
            state._comm_ctx.post_forward_order.clear()
            if state._fsdp_param_group is not None:
                state._fsdp_param_group._post_forward_indices.clear()


def _rest(backbone: nn.Module, modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    """The parameters beside those of some modules; one that is in both is here too."""
    inside = {owner for m in modules for owner in m.modules()}
    return {p for m in backbone.modules() if m not in inside for p in m.parameters(recurse=False)}


def _drop_hooks(module: nn.Module) -> None:
    """Those of FSDP; it has no way to take them off."""
    tables = {key: table for key, table in vars(module).items() if "_hooks" in key and isinstance(table, dict)}
    for key in [
        key
        for table in tables.values()
        for key, hook in table.items()
        if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp")
    ]:
        for table in tables.values():
            table.pop(key, None)

"""What begins from data: a ladder pruned by Fisher information, a side network distilled from its backbone, a path that
reads components."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from restuning.data.objective import objective
from restuning.hooks.taps import tap
from restuning.methods.spec import side_of
from restuning.model.adapter import AdapterModule, prune_ladder
from restuning.model.tuned import Tuned, arguments
from restuning.side.features import FeatureRequest
from restuning.side.ladder import LadderNet
from restuning.side.side_tuning import SideNet, SideTuning
from restuning.side.stages import PathNetwork
from restuning.training.components import fit_components
from restuning.training.evaluate import Examples, loader, to_device

FISHER_EXAMPLES = 128


def needs_data(tuned: Tuned) -> bool:
    """Whether the active adapter's method begins from data."""
    side = side_of(tuned.adapter(tuned.active()[0]).method)
    return side is not None and side.needs_data


def initialise(tuned: Tuned, examples: Examples, seed: int = 0) -> None:
    """Give the active adapter's side network the beginning that its method asks for; most ask for none.

    Args:
        tuned: the model.
        examples: (inputs, label) as the backbone takes them, not the features of a bank.
        seed: of the examples that are drawn.
    """
    adapter = tuned.adapter(tuned.active()[0])
    part, net = side_of(adapter.method), adapter.side
    if part is None or not part.needs_data:
        return
    if isinstance(net, LadderNet):
        information = fisher(tuned, adapter, examples, seed)
        prune_ladder(net, tuned.backbone, tuned.sites, information.__getitem__)
    elif isinstance(part, SideTuning) and isinstance(net, SideNet):
        for epoch in range(part.distil):
            _distil(tuned, net, examples, seed + epoch)
    elif isinstance(net, PathNetwork) and net.stages.components is not None:
        net.set_components(fit_components(tuned, examples, net.stages.components).bases)


def fisher(tuned: Tuned, adapter: AdapterModule, examples: Examples, seed: int = 0) -> dict[nn.Parameter, Tensor]:
    """The empirical Fisher information of the backbone's weights: the mean of the squared gradients of the loss that
    the adapter's new head has on the frozen features, over at most 128 examples one by one."""
    backbone = tuned.backbone
    weights = [p for p in backbone.parameters() if p.ndim == 2]
    sums = {weight: torch.zeros_like(weight) for weight in weights}
    modes = [(p, p.requires_grad) for p in weights]
    picked = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))[:FISHER_EXAMPLES].tolist()
    device = weights[0].device
    request = FeatureRequest((adapter.depth,), adapter.request.tokens)
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for inputs, label in loader(examples, sampler=picked):
            with torch.enable_grad(), tap(backbone, tuned.sites, request) as taps:
                call, named = arguments((to_device(inputs, device),), {})
                backbone(*call, **named)
                logits = adapter.outputs(tuned.reader(tuned.active()[0]).tail(taps.features.last))
                loss = objective(adapter.config.kind).loss(logits, label.to(device))
            for weight, grad in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
                if grad is not None:
                    sums[weight] += grad.square() / len(picked)
    finally:
        for weight, mode in modes:
            weight.requires_grad_(mode)
    return sums


def _distil(tuned: Tuned, side: SideNet, examples: Examples, seed: int) -> None:
    """One epoch in which the side network learns the backbone's own pooled features (Zhang et al. 2020)."""
    optimizer = torch.optim.AdamW(side.net.parameters(), lr=1e-3)
    device = next(tuned.parameters()).device
    order = torch.Generator().manual_seed(seed)
    side.net.train()
    for inputs, _ in loader(examples, 32, shuffle=True, generator=order):
        features = tuned.features(to_device(inputs, device))
        loss = F.mse_loss(side(features), tuned.reader(tuned.active()[0]).tail(features.last).detach())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

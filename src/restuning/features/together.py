"""Training the weights that many tasks share: a batch of every task in each step, the sum of their losses."""

from collections.abc import Callable, Sequence

import torch

from restuning.data.objective import Objective
from restuning.errors import MethodError
from restuning.features.memory import CachedFeatures, FromFeatures
from restuning.side.query import SharedQueryNet
from restuning.training.config import TrainConfig, data_order, learning_rate, parameter_groups


def train_together(
    models: Sequence[FromFeatures],
    data: Sequence[CachedFeatures],
    objectives: Sequence[Objective],
    config: TrainConfig,
    seen: Callable[[int, int, float], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Train tasks whose paths share weights, these too. Each step is a batch of every task, and there are as many steps
    as the largest task has. Returns the shared weights, by the names of a path's buffers.

    Args:
        models: of method `bypass-query-shared` or its like, of one size and the same components.
        data: of each task.
        objectives: of each task.
        config: the recipe.
        seen: told the step, of how many, and the mean loss of the tasks.

    Raises:
        MethodError: a path that shares nothing.
    """
    nets = [net for model in models for net in model.modules() if isinstance(net, SharedQueryNet)]
    if not nets or len(nets) != len(models):
        raise MethodError("weights are shared by the paths of bypass-query-shared: expected it in every task")
    for net in nets[1:]:
        net.share_with(nets[0])
    shared = nets[0].shared()
    groups = [group for model in models for group in parameter_groups(model, config.weight_decay)]
    groups.append({"params": shared, "weight_decay": config.weight_decay})
    optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
    each = [-(-len(rows) // config.batch_size) for rows in data]
    steps = config.epochs * max(each)
    warmup = min(config.warmup_epochs, 0.2 * config.epochs) * max(each)
    for t in shared:
        t.requires_grad_(True)
    try:
        for step in range(steps):
            total = 0.0
            optimizer.zero_grad()
            for i, (model, rows, task) in enumerate(zip(models, data, objectives, strict=True)):
                epoch, at = divmod(step, each[i])
                batch = data_order(len(rows), config.batch_size, config.seed * len(models) + i, epoch)[at]
                features, labels = rows.__getitems__(batch)
                loss = task.loss(model(features), labels)
                torch.autograd.backward(loss)
                total += float(loss.detach())
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, warmup, config.lr, config.schedule)
            optimizer.step()
            if seen is not None:
                seen(step + 1, steps, total / len(models))
    finally:
        for t in shared:
            t.requires_grad_(False)
            t.grad = None
    return {name: t.detach().clone() for name, t in nets[0].named_buffers()}

"""Which of several learning rates, where features are kept and a training costs little."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from restuning.data.objective import objective, sort_key
from restuning.data.task import Items, Source, Subset, split
from restuning.errors import Diverged
from restuning.features.memory import CachedFeatures
from restuning.training.checkpoint import changing_tensors, restore
from restuning.training.config import TrainConfig
from restuning.training.evaluate import evaluate
from restuning.training.loop import fit


def best_rate(
    rates: Sequence[float], module: nn.Module, examples: CachedFeatures, items: Items, config: TrainConfig, kind: str
) -> float:
    """The rate that is best on a fifth of the examples, held out, each class by its share; of equals the first. The
    module stays as it was.

    Args:
        rates: of which one is chosen.
        module: reads the examples, `FromFeatures`.
        examples: of what it trains on.
        items: the same, for their labels.
        config: how it trains.
        kind: of task.
    """
    start, scores = changing_tensors(module), dict[float, float | None]()
    parts = split("", Source((), items, None, items, kind), None, len(items) // 5, None, config.seed)
    assert isinstance(parts.train, Subset) and isinstance(parts.val, Subset)
    train, val = (CachedFeatures(*examples.__getitems__(part.indices)) for part in (parts.train, parts.val))
    for lr in rates:
        try:
            fit(module, train, None, replace(config, lr=lr), objective=objective(kind), progress=False)
            scores[lr] = next(evaluate(module, val, config.batch_size, kind=kind))[1]
        except Diverged:  # a rate that is too high is no choice, and no reason to stop
            scores[lr] = None
        restore(module, start)
    return max(rates, key=lambda lr: sort_key(scores[lr]))

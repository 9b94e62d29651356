"""What is trained side by side, and how long."""

from dataclasses import dataclass

from restuning.backbones.load import MICRO
from restuning.methods.spec import Method
from restuning.side import BypassQuery
from restuning.utils.hub import MINILM

BACKBONES = (MICRO, "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", MINILM)
"""What the page's list offers; any other name that `restuning.load_backbone` knows can be typed."""

EXAMPLES, MOST_EPOCHS = 2_000, 40
"""Examples that a model sees at least while it is trained: where there are few pictures there are more epochs, up to so
many."""


@dataclass(frozen=True)
class Recipe:
    """A method and how it is trained on the page.

    Args:
        about: in a few words.
        method: on the backbone's features.
        epochs: over the pictures, where there are many.
        lr: learning rate, of AdamW.
        batch_size: of a step.
        fixed: whether a person has set the epochs.
        pool: how tokens are pooled; None: as the backbone does.
    """

    about: str
    method: str | Method
    epochs: int
    lr: float
    batch_size: int = 64
    fixed: bool = False
    pool: str | None = None

    def epochs_for(self, examples: int) -> int:
        """More where there are few examples."""
        return self.epochs if self.fixed else max(self.epochs, min(MOST_EPOCHS, EXAMPLES // max(examples, 1)))


RECIPES: dict[str, Recipe] = {
    "linear": Recipe("a head on the last layer", "linear", 15, 0.02),
    "linear-mean": Recipe("a head on the mean of the tokens", "linear", 15, 0.02, pool="mean"),
    "bypass": Recipe("a path past all layers", "bypass", 8, 0.03, 128),
    "bypass-mean": Recipe("a path past all layers, on the mean of the tokens", "bypass-mean", 8, 0.03, 128),
    "bypass-query": Recipe(
        "queries that mix tokens", BypassQuery(width=32, stages=2, queries=4, grid=2, shared=True), 7, 0.008
    ),
    "bypass-query-mean": Recipe(
        "queries on the means of all layers", BypassQuery(width=32, stages=2, queries=4, grid=1, shared=True), 7, 0.008
    ),
}
"""Name → recipe, the cheapest first."""
KINDS = {
    "pictures": ("linear", "bypass", "bypass-query"),
    # a text has too many tokens to keep them all
    "texts": ("linear-mean", "bypass-mean", "bypass-query-mean"),
}
"""What is trained of a project's kind; the first of them is linear probing."""

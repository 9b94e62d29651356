"""What is trained side by side, and how long."""

from dataclasses import dataclass

from restuning.methods.spec import Method
from restuning.side import BypassQuery

EXAMPLES = 12_000
"""Examples that a model sees at most while it is trained: beyond them there are fewer epochs, and one at least."""


@dataclass(frozen=True)
class Recipe:
    """A method and how it is trained on the page.

    Args:
        about: in a few words.
        method: on the backbone's features.
        epochs: over the pictures, where there are few.
        lr: learning rate, of AdamW.
        batch_size: of a step.
    """

    about: str
    method: str | Method
    epochs: int
    lr: float
    batch_size: int = 64

    def epochs_for(self, examples: int) -> int:
        """As many as `EXAMPLES` allow."""
        return max(1, min(self.epochs, EXAMPLES // max(examples, 1)))


RECIPES: dict[str, Recipe] = {
    "linear": Recipe("a head on the last layer", "linear", 30, 0.01),
    "bypass": Recipe("a path past all layers", "bypass", 15, 0.02, 128),
    "bypass-query": Recipe("queries that mix tokens", BypassQuery(width=32, stages=2, queries=4, grid=2), 10, 0.01),
}
"""Name → recipe, the cheapest first."""

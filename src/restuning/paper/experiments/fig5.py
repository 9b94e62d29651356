"""Figure 5: few-shot learning on five fine-grained sets; the paper prints curves, no numbers."""

from restuning.data.known import FEWSHOT
from restuning.paper.experiments.spec import Data, Experiment, Row

SHOTS = (1, 2, 4, 8, 16)
_METHODS = ("adapter", "lora", "vpt-deep", "noah", "res-tuning", "side-tuning", "lst", "bypass")

TASKS = tuple(
    Data(
        f"{known.about}, {shots}",
        f"fewshot:{{root}}/noah/few-shot/{name}?shots={shots}&seed={{seed}}",
        group=known.about,
        train=known.classes * shots,
        test=known.test,
    )
    for name, known in FEWSHOT.items()
    for shots in SHOTS
)

ROWS = tuple(Row(method, method, {}) for method in _METHODS)

EXPERIMENT = Experiment("fig5", "Figure 5: few-shot learning", tuple(t.name for t in TASKS), ROWS, TASKS, epochs=(100,))

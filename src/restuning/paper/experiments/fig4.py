"""Figure 4: multi-task inference against as many fully fine-tuned models."""

from restuning.paper.experiments.spec import Experiment, Row

COLUMNS = ("time saved",)

_BENCH = "restuning bench multitask --tasks 19 --out runs/fig4"

ROWS = (
    Row("19 discriminative tasks", "bypass", {"time saved": 0.809}, command=_BENCH),
    Row("10 prompts of a diffusion model", None, {"time saved": 0.836}),
)

EXPERIMENT = Experiment(
    "fig4", "Figure 4: time saved by sharing one backbone pass", COLUMNS, ROWS, margin=0.05, command=_BENCH
)

"""Table 3b: the bypass with and without its tuners."""

from restuning.paper.experiments.spec import CIFAR, FULL_RATES, Experiment, Row, printed

COLUMNS = ("CIFAR-100", "parameters_M", "memory_GB")

ROWS = (
    Row("Full", "full", dict(zip(COLUMNS, (89.12, 85.9, 9.02), strict=True)), lrs=FULL_RATES),
    *printed(
        COLUMNS,
        ("Linear", "linear", 85.95, 0.07, 2.72),
        ("Bypass None", "bypass-none", 86.34, 0.07, 3.48),
        ("Bypass Hori.", "bypass-horizontal", 88.08, 0.27, 3.66),
        ("Bypass Vert.", "bypass-vertical", 87.26, 0.27, 3.64),
        ("Bypass Both", "bypass", 89.33, 0.46, 4.72),
    ),
)

EXPERIMENT = Experiment("tab3b", "Table 3b: the bypass with and without its tuners", COLUMNS, ROWS, (CIFAR,))

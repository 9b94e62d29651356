"""Table 3c: memory and accuracy beside other methods."""

from restuning.paper.experiments.spec import CIFAR, FULL_RATES, Experiment, Row, printed

COLUMNS = ("CIFAR-100", "parameters_M", "memory_GB")

ROWS = (
    Row("Full", "full", dict(zip(COLUMNS, (89.12, 85.9, 9.02), strict=True)), lrs=FULL_RATES),
    *printed(
        COLUMNS,
        ("Linear", "linear", 85.95, 0.07, 2.72),
        ("MAM-Adapter", "mam-adapter", 91.7, 10.08, 9.57),
        ("AdaptFormer", "adaptformer", 91.86, 1.26, 6.32),
        ("Res-Tuning", "res-tuning", 93.25, 0.48, 6.85),
        ("Side-Tuning", "side-tuning", 87.16, 9.62, 3.48),
        ("LST", "lst", 88.72, 0.93, 5.26),
        ("Res-Tuning-Bypass", "bypass", 89.33, 0.46, 4.72),
    ),
)

EXPERIMENT = Experiment("tab3c", "Table 3c: memory and accuracy beside other methods", COLUMNS, ROWS, (CIFAR,))

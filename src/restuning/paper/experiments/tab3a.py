"""Table 3a: single, dual and tri Res-Tuners on CIFAR-100."""

from restuning.paper.experiments.spec import CIFAR, FULL_RATES, Experiment, Row, printed

COLUMNS = ("CIFAR-100", "parameters_M")

ROWS = (
    Row("Full", "full", dict(zip(COLUMNS, (89.12, 85.9), strict=True)), lrs=FULL_RATES),
    *printed(
        COLUMNS,
        ("Linear", "linear", 85.95, 0.07),
        ("Single-Res-Tuner", "res-tuning-single", 92.68, 0.17),
        ("Dual-Res-Tuner", "res-tuning", 93.25, 0.48),
        ("Tri-Res-Tuner", "res-tuning-tri", 93.28, 0.67),
    ),
)

EXPERIMENT = Experiment("tab3a", "Table 3a: single, dual and tri Res-Tuners on CIFAR-100", COLUMNS, ROWS, (CIFAR,))

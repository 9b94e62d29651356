"""Table 15: blocks left without tuners, counted from 1, on CIFAR-100."""

from restuning.paper.experiments.spec import CIFAR, Experiment, Row, without

COLUMNS = ("CIFAR-100", "parameters_M", "memory_GB")

_DROPPED = {
    (): ((93.25, 0.48, 6.85), (89.33, 0.46, 4.72)),
    (3, 6, 9): ((92.88, 0.38, 6.73), (89.3, 0.36, 4.36)),
    (2, 3, 5, 7, 9, 11): ((92.96, 0.28, 6.68), (88.89, 0.27, 3.96)),
    (2, 3, 4, 5, 6, 8, 9, 10, 11): ((92.71, 0.18, 6.56), (88.79, 0.17, 3.65)),
    (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11): ((87.77, 0.11, 3.31), (88.49, 0.11, 3.48)),
}

ROWS = tuple(
    Row(
        f"{name} without {{{', '.join(map(str, dropped))}}}",
        method,
        dict(zip(COLUMNS, values[side], strict=True)),
        blocks=without(*dropped),
    )
    for side, (name, method) in enumerate((("Res-Tuning", "res-tuning"), ("Bypass", "bypass")))
    for dropped, values in _DROPPED.items()
)

EXPERIMENT = Experiment("tab15", "Table 15: blocks left without tuners", COLUMNS, ROWS, (CIFAR,))

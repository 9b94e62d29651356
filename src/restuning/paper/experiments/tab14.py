"""Table 14: tuners in the first blocks only, on CIFAR-100."""

from restuning.paper.experiments.spec import CIFAR, Experiment, Row

COLUMNS = ("CIFAR-100", "parameters_M", "memory_GB")

_LAST = {
    1: ((92.23, 0.11, 6.43), (88.5, 0.11, 3.58)),
    3: ((92.78, 0.18, 6.52), (88.6, 0.17, 3.73)),
    6: ((92.93, 0.28, 6.64), (89.05, 0.27, 4.09)),
    9: ((93.17, 0.38, 6.84), (89.32, 0.36, 4.53)),
    12: ((93.25, 0.48, 6.85), (89.33, 0.46, 4.72)),
}

ROWS = tuple(
    Row(f"{name}, 1-{last}", method, dict(zip(COLUMNS, values[side], strict=True)), blocks=tuple(range(last)))
    for side, (name, method) in enumerate((("Res-Tuning", "res-tuning"), ("Bypass", "bypass")))
    for last, values in _LAST.items()
)

EXPERIMENT = Experiment("tab14", "Table 14: tuners in the first blocks only", COLUMNS, ROWS, (CIFAR,))

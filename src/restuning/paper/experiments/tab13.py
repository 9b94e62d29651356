"""Table 13: widths of adapters on CIFAR-100."""

from restuning.paper.experiments.spec import CIFAR, Experiment, Row

COLUMNS = ("CIFAR-100", "parameters_M", "memory_GB")

_WIDTHS = {
    5: ((93.03, 0.3, 6.84), (89.16, 0.37, 4.65)),
    10: ((93.25, 0.48, 6.85), (89.33, 0.46, 4.72)),
    20: ((92.98, 0.85, 6.87), (89.28, 0.64, 4.83)),
    50: ((92.69, 1.96, 6.9), (89.22, 1.19, 5.08)),
    100: ((92.48, 3.8, 6.96), (89.52, 2.11, 5.68)),
}


def _bypass(width: int) -> dict[str, object]:
    """The paper's counts fit where the horizontal group stays at 10."""
    sides = {"horizontal": 10, "vertical": width}
    return {"kind": "bypass", **{side: {"tuner": "adapter", "width": w} for side, w in sides.items()}}


ROWS = (
    *(
        Row(f"Res-Tuning, {width}", "res-tuning", dict(zip(COLUMNS, inside, strict=True)), size=width)
        for width, (inside, _) in _WIDTHS.items()
    ),
    *(
        Row(f"Bypass, {width}", _bypass(width), dict(zip(COLUMNS, beside, strict=True)))
        for width, (_, beside) in _WIDTHS.items()
    ),
)

EXPERIMENT = Experiment("tab13", "Table 13: widths of adapters on CIFAR-100", COLUMNS, ROWS, (CIFAR,))

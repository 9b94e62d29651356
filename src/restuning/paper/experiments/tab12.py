"""Table 12: FGVC, five fine-grained sets in VPT's splits."""

from restuning.data.known import FGVC
from restuning.paper.experiments.spec import FULL_RATES, Data, Experiment, Row, printed

COLUMNS = (
    "CUB-200-2011",
    "NABirds",
    "Oxford Flowers",
    "Stanford Cars",
    "Stanford Dogs",
    "All",
    "parameters_M",
    "memory_GB",
)

TASKS = tuple(
    Data(known.about, f"fgvc:{{root}}/fgvc/{name}", train=known.train, test=known.test) for name, known in FGVC.items()
)

ROWS = (
    Row(
        "Full",
        "full",
        dict(zip(COLUMNS, (87.3, 82.7, 98.8, 84.5, 89.4, 88.54, 85.98, 9.4), strict=True)),
        lrs=FULL_RATES,
    ),
    *printed(
        COLUMNS,
        ("Linear", "linear", 85.3, 75.9, 97.9, 51.3, 86.2, 79.32, 0.18, 3.09),
        ("Adapter", "adapter", 87.3, 84.3, 98.4, 68.4, 88.8, 85.46, 1.96, 6.55),
        ("Prefix", "prefix", 85.4, 78.8, 99.2, 76.4, 89.5, 85.86, 0.36, 6.6),
        ("VPT-Shallow", "vpt-shallow", 86.7, 78.8, 98.4, 68.7, 90.7, 84.62, 0.25, 8.14),
        ("VPT-Deep", "vpt-deep", 88.5, 84.2, 99.0, 83.6, 90.2, 89.11, 0.85, 8.16),
        ("LoRA", "lora", 86.0, 80.2, 99.2, 85.2, 88.6, 87.84, 0.55, 6.78),
        ("Convpass", "convpass", 86.9, 81.4, 99.3, 85.7, 89.9, 88.66, 0.51, 7.44),
        ("SSF", "ssf", 89.5, 85.7, 99.6, 89.2, 89.6, 90.72, 0.39, 7.47),
        ("Res-Tuning", "res-tuning", 89.66, 85.87, 99.45, 87.58, 92.21, 90.95, 0.68, 8.98),
        ("Side-Tuning", "side-tuning", 84.7, 75.8, 96.9, 48.6, 85.8, 78.35, 9.73, 3.48),
        ("LST", "lst", 82.98, 76.11, 98.83, 78.46, 87.89, 84.85, 1.04, 5.28),
        ("Res-Tuning-Bypass", "bypass", 88.75, 83.0, 99.61, 75.41, 92.4, 87.83, 0.56, 4.73),
    ),
)

EXPERIMENT = Experiment(
    "tab12", "Table 12: FGVC, five fine-grained sets", COLUMNS, ROWS, TASKS, augment=True, margin=1.5
)

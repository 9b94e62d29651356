"""Table 5: domain generalisation from 16 shots of ImageNet."""

from restuning.paper.experiments.spec import Data, Experiment, printed

COLUMNS = ("ImageNet", "V2", "Sketch", "A", "R", "All")

TASKS = (
    Data(
        "ImageNet",
        "domains:{root}/noah?shots=16&seed={seed}",
        train=16_000,
        test=50_000 + 98_389,
        targets={name: f"domains:{{root}}/noah?target={name.lower()}" for name in ("V2", "Sketch", "A", "R")},
    ),
)

ROWS = printed(
    COLUMNS,
    ("Adapter", "adapter", 70.5, 59.1, 16.4, 5.5, 22.1, 25.8),
    ("VPT", "vpt-deep", 70.5, 58.0, 18.3, 4.6, 23.2, 26.0),
    ("LoRA", "lora", 70.8, 59.3, 20.0, 6.9, 23.3, 27.4),
    ("NOAH", "noah", 71.5, 66.1, 24.8, 11.9, 28.5, 32.8),
    ("Res-Tuning", "res-tuning", 78.04, 66.58, 29.23, 13.15, 29.01, 34.5),
    ("Side-Tuning", "side-tuning", 74.57, 62.52, 23.55, 10.37, 25.06, 30.38),
    ("LST", "lst", 70.0, 57.04, 14.39, 7.21, 17.02, 23.92),
    ("Res-Tuning-Bypass", "bypass", 77.3, 65.23, 27.39, 10.66, 26.45, 32.43),
)

EXPERIMENT = Experiment(
    "tab5",
    "Table 5: domain generalisation from 16 shots of ImageNet",
    COLUMNS,
    ROWS,
    TASKS,
    margin=2.0,
    note="All: the mean of the four targets; on A and R the answer is one of their 200 classes",
)

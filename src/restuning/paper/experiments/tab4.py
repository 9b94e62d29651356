"""Table 4: VTAB-1k, 19 tasks in three groups; Group is the mean of the groups' means, All the mean of the tasks."""

from collections.abc import Iterator
from dataclasses import replace

from restuning.data.known import VTAB
from restuning.paper.experiments.spec import FULL_RATES, Data, Experiment, printed

COLUMNS = (
    *("CIFAR-100", "Caltech101", "DTD", "Flowers102", "Pets", "SVHN", "SUN397"),
    *("Camelyon", "EuroSAT", "Resisc45", "Retinopathy"),
    *("Clevr-Count", "Clevr-Dist", "DMLab", "KITTI-Dist", "dSpr-Loc", "dSpr-Ori", "sNORB-Azim", "sNORB-Ele"),
    *("Group", "All", "parameters_M", "memory_GB"),
)

_GROUPS = {"natural": 7, "specialised": 4, "structured": 8}
_OF = [group for group, count in _GROUPS.items() for _ in range(count)]

TASKS = tuple(
    Data(known.about, f"vtab:{{root}}/vtab-1k/{name}", group, test=known.test)
    for (name, known), group in zip(VTAB.items(), _OF, strict=True)
)

_PRINTED = """
Full: full
68.9 87.7 64.3 97.2 86.9 87.4 38.8 79.7 95.7 84.2 73.9 56.3 58.6 41.7 65.5 57.5 46.7 25.7 29.1 68.96 65.57 85.84 9.4
Linear: linear
63.4 85.0 63.2 97.0 86.3 36.6 51.0 78.5 87.5 68.6 74.0 34.3 30.6 33.2 55.4 12.5 20.0 9.6 19.2 57.64 52.94 0.04 3.09
Adapter: adapter
74.2 85.7 62.7 97.8 87.2 36.4 50.7 76.9 89.2 73.5 71.6 45.2 41.8 31.1 56.4 30.4 24.6 13.2 22.0 60.52 56.35 1.82 6.53
LoRA: lora
67.1 91.4 69.4 98.8 90.4 85.3 54.0 84.9 95.3 84.4 73.6 82.9 69.2 49.8 78.5 75.7 47.1 31.0 44.0 74.6 72.3 0.29 6.88
VPT-Deep: vpt-deep
78.8 90.8 65.8 98.0 88.3 78.1 49.6 81.8 96.1 83.4 68.4 68.5 60.0 46.5 72.8 73.6 47.9 32.9 37.8 71.96 69.43 0.6 8.13
SSF: ssf
69.0 92.6 75.1 99.4 91.8 90.2 52.9 87.4 95.9 87.4 75.5 75.9 62.3 53.3 80.6 77.3 54.9 29.5 37.9 75.69 73.1 0.24 7.47
NOAH: noah
69.6 92.7 70.2 99.1 90.4 86.1 53.7 84.4 95.4 83.9 75.8 82.8 68.9 49.9 81.7 81.8 48.3 32.8 44.2 75.48 73.25 0.42 7.27
Res-Tuning: res-tuning
75.2 92.7 71.9 99.3 91.9 86.7 58.5 86.7 95.6 85.0 74.6 80.2 63.6 50.6 80.2 85.4 55.7 31.9 42.0 76.32 74.1 0.55 8.95
Side-Tuning: side-tuning
60.7 60.8 53.6 95.5 66.7 34.9 35.3 58.5 87.7 65.2 61.0 27.6 22.6 31.3 51.7 8.2 14.4 9.8 21.8 49.91 45.65 9.59 3.48
LST: lst
58.0 87.1 66.2 99.1 89.7 63.2 52.6 81.9 92.2 78.5 69.4 68.6 56.1 38.8 73.4 72.9 30.5 16.6 31.0 67.56 64.52 0.89 5.13
Res-Tuning-Bypass: bypass
64.5 88.8 73.2 99.4 90.6 63.5 57.2 85.5 95.2 82.4 75.2 70.4 61.0 40.2 66.8 79.2 52.6 26.0 49.3 72.32 69.51 0.42 4.73
"""


def _rows(text: str) -> Iterator[tuple[str | float, ...]]:
    lines = text.strip().splitlines()
    for head, numbers in zip(lines[::2], lines[1::2], strict=True):
        yield (*head.split(": "), *map(float, numbers.split()))


_FULL, *_OTHERS = printed(COLUMNS, *_rows(_PRINTED))
ROWS = (replace(_FULL, lrs=FULL_RATES), *_OTHERS)

EXPERIMENT = Experiment("tab4", "Table 4: VTAB-1k", COLUMNS, ROWS, TASKS, margin=3.0)

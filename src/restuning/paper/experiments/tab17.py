"""Table 17: RoBERTa-base on SST-2 and MNLI."""

from restuning.paper.experiments.spec import Data, Experiment, printed

COLUMNS = ("SST-2", "MNLI", "parameters_M", "memory_GB")

ROWS = printed(
    COLUMNS,
    ("MAM Adapter", "mam-adapter", 94.2, 87.4, 0.61, 22.4),
    ("Res-Tuning", "res-tuning-nlp", 94.56, 87.45, 0.97, 19.3),
    ("Res-Tuning-Bypass", "bypass", 92.94, 82.01, 0.98, 4.3),
)

TASKS = (Data("SST-2", "glue:sst2", train=67_349, test=872), Data("MNLI", "glue:mnli", train=392_702, test=9815))

EXPERIMENT = Experiment(
    "tab17",
    "Table 17: RoBERTa-base on SST-2 and MNLI",
    COLUMNS,
    ROWS,
    TASKS,
    backbone="hf:roberta-base",
    lrs=(0.001, 0.0005, 0.0001),
    epochs=(10,),
    note="parameters at inference; the paper's train time has no unit",
)

"""Table 2c: a third Res-Tuner, on Block, on CIFAR-100."""

from restuning.paper.experiments.spec import CIFAR, Experiment, printed, residual

COLUMNS = ("CIFAR-100",)

ROWS = printed(
    COLUMNS,
    ("dual, Res-Adapter on Block", residual(mha="adapter", ffn="adapter", block="adapter"), 93.28),
    ("dual, Res-Prefix on Block", residual(mha="adapter", ffn="adapter", block="prefix"), 93.2),
    ("dual, Res-Prompt on Block", residual(mha="adapter", ffn="adapter", block="prompt"), 93.16),
)

EXPERIMENT = Experiment("tab2c", "Table 2c: a third Res-Tuner, on Block, on CIFAR-100", COLUMNS, ROWS, (CIFAR,))

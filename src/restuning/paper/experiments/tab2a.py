"""Table 2a: one Res-Tuner a block on CIFAR-100."""

from restuning.paper.experiments.spec import CIFAR, Experiment, printed, residual

COLUMNS = ("CIFAR-100",)

ROWS = printed(
    COLUMNS,
    ("Res-Adapter on MHA", residual(mha="adapter"), 92.46),
    ("Res-Adapter on FFN", residual(ffn="adapter"), 92.34),
    ("Res-Adapter on Block", residual(block="adapter"), 92.49),
    ("Res-Prefix on MHA", residual(mha="prefix"), 91.88),
    ("Res-Prefix on FFN", residual(ffn="prefix"), 92.33),
    ("Res-Prefix on Block", residual(block="prefix"), 92.39),
    ("Res-Prompt on MHA", residual(mha="prompt"), 92.24),
    ("Res-Prompt on FFN", residual(ffn="prompt"), 92.68),
    ("Res-Prompt on Block", residual(block="prompt"), 92.16),
)

EXPERIMENT = Experiment("tab2a", "Table 2a: one Res-Tuner a block on CIFAR-100", COLUMNS, ROWS, (CIFAR,))

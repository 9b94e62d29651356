"""Table 2b: two Res-Tuners a block on CIFAR-100."""

from restuning.paper.experiments.spec import CIFAR, Experiment, printed, residual

COLUMNS = ("CIFAR-100",)

ROWS = printed(
    COLUMNS,
    ("Res-Adapter on MHA, Res-Adapter on FFN", residual(mha="adapter", ffn="adapter"), 93.25),
    ("Res-Adapter on MHA, Res-Prefix on FFN", residual(mha="adapter", ffn="prefix"), 92.95),
    ("Res-Adapter on MHA, Res-Prompt on FFN", residual(mha="adapter", ffn="prompt"), 92.62),
    ("Res-Prefix on MHA, Res-Adapter on FFN", residual(mha="prefix", ffn="adapter"), 93.22),
    ("Res-Prefix on MHA, Res-Prefix on FFN", residual(mha="prefix", ffn="prefix"), 92.38),
    ("Res-Prefix on MHA, Res-Prompt on FFN", residual(mha="prefix", ffn="prompt"), 92.87),
    ("Res-Prompt on MHA, Res-Adapter on FFN", residual(mha="prompt", ffn="adapter"), 93.03),
    ("Res-Prompt on MHA, Res-Prefix on FFN", residual(mha="prompt", ffn="prefix"), 92.92),
    ("Res-Prompt on MHA, Res-Prompt on FFN", residual(mha="prompt", ffn="prompt"), 92.91),
)

EXPERIMENT = Experiment("tab2b", "Table 2b: two Res-Tuners a block on CIFAR-100", COLUMNS, ROWS, (CIFAR,))

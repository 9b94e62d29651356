"""Table 1: the original and the unbound form of prefix, prompt and adapter tuning say the same."""

from restuning.paper.experiments.spec import Experiment, Row

EXPERIMENT = Experiment(
    "tab1",
    "Table 1: original and unbound forms are equivalent",
    ("largest difference",),
    (Row("prefix, prompt, adapter: unbound against bound", None, {"largest difference": 0.03}),),
    command="python -m pytest tests/test_unbind.py",
    margin=0.03,
    note="the paper: every difference is within 0.03 points; here the two forms are equal up to rounding, by test",
)

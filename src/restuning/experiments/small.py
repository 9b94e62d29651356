"""The small edition: the paper's comparisons on real and generated data that two CPU cores can carry.

ViT-Ti/16 of ImageNet; 1,000 training images a task, of which 200 choose the rate, the same for every seed and method.
`{root}` holds `vit_tiny_patch16_224_in1k`, `caltech101` and `eurosat`. Four experiments: what reads features, at 224
pixels; what acts inside the backbone, and the bypass beside it, at 96 pixels and few epochs; few shots; other domains.
"""

from typing import Any

from restuning.experiments.spec import Data, Experiment, Row, residual

_CALTECH = "tar:{root}/caltech101/caltech101_short128_max40.tar"
_EUROSAT = "tar:{root}/eurosat/eurosat_rgb64_every6th.tar"
_TI: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "weights": "{root}/vit_tiny_patch16_224_in1k/model.safetensors",
}

TASKS = (
    Data("Caltech-101", f"part:1000,800:{_CALTECH}", "natural", test=800),
    Data("digits", "part:1000,359:digits", "natural", test=359),
    Data("EuroSAT", f"part:1000,1000:{_EUROSAT}", "specialised", test=1000),
    Data("sprite location", "part:1000,1000:sprites:location", "structured", test=1000),
    Data("sprite orientation", "part:1000,1000:sprites:orientation", "structured", test=1000),
    Data("counting", "part:1000,1000:sprites:count", "structured", test=1000),
)
COLUMNS = (*(task.name for task in TASKS), "Group", "All")

BESIDE = (
    Row("linear", "linear", {}),
    Row("bypass-none", "bypass-none", {}),
    Row("bypass-horizontal", "bypass-horizontal", {}),
    Row("bypass-vertical", "bypass-vertical", {}),
    Row("bypass", "bypass", {}),
    Row("bypass-mean", "bypass-mean", {}),
    Row("bypass-grid2", "bypass-grid2", {}),
    Row("LST on a grid", {"kind": "ladder", "reduction": 16, "init": "random", "grid": 2}, {}),
)
"""They read features: one pass of the backbone over a task serves all of them."""

INSIDE = (
    Row("linear", "linear", {}, epochs=(50,)),
    Row("bypass", "bypass", {}, epochs=(50,)),
    *(
        Row(name, name, {}, lrs=lrs)
        for name, lrs in (
            ("res-tuning", (0.005,)),
            ("lora", (0.005,)),
            ("adapter", (0.005,)),
            ("ssf", (0.005,)),
            ("vpt-deep", (0.005,)),
            ("dtl", (0.005,)),
            ("lst", (0.005,)),
            ("side-tuning", (0.001,)),
            ("full", (0.0002,)),
        )
    ),
    Row("Res-Prefix on MHA, Res-Adapter on FFN", residual(mha="prefix", ffn="adapter"), {}, lrs=(0.005,)),
)

_HEADS = tuple(row for row in BESIDE if row.name in ("linear", "bypass-none", "bypass", "bypass-grid2"))
_SHOTS = (1, 2, 4, 8, 16)

FEATURES = Experiment(
    "small-features",
    "The small edition: what reads features, six tasks, 224 pixels",
    COLUMNS,
    BESIDE,
    TASKS,
    **_TI,
    lrs=(0.01, 0.005, 0.001),
    epochs=(50,),
)
TUNERS = Experiment(
    "small-inside",
    "The small edition: inside the backbone, 96 pixels, 8 epochs, one rate and one seed",
    COLUMNS,
    INSIDE,
    TASKS,
    **_TI,
    image_size=96,
    lrs=(0.01, 0.005, 0.001),
    epochs=(8,),
    seeds=(0,),
    note="linear probing and the bypass choose among three rates and train longer, from features",
)
FEWSHOT = Experiment(
    "small-fewshot",
    "The small edition: few shots of Caltech-101",
    tuple(f"Caltech-101, {k}" for k in _SHOTS),
    _HEADS,
    tuple(Data(f"Caltech-101, {k}", _CALTECH, "Caltech-101", 102 * k, 802, shots=k) for k in _SHOTS),
    **_TI,
    lrs=(0.005,),
    epochs=(50,),
)
DOMAINS = Experiment(
    "small-domains",
    "The small edition: Caltech-101, tested on corrupted, sketched and rotated copies",
    ("Caltech-101", "corrupted", "sketched", "rotated", "All"),
    _HEADS,
    (
        Data(
            "Caltech-101",
            f"part:1000,800:{_CALTECH}",
            test=4 * 800,
            targets={how: f"altered:{how}:part:1000,800:{_CALTECH}" for how in ("corrupted", "sketched", "rotated")},
        ),
    ),
    **_TI,
    lrs=(0.01, 0.005, 0.001),
    epochs=(50,),
    note="All: the mean of the three altered copies",
)
MICRO = Experiment(
    "small-micro",
    "The small edition on restuning-micro, where it was not trained on the task",
    (*(task.name for task in TASKS[1:]), "Group", "All"),
    BESIDE,
    TASKS[1:],
    backbone="restuning-micro",
    lrs=(0.01, 0.005, 0.001),
    epochs=(50,),
)
EXPERIMENTS = (FEATURES, FEWSHOT, DOMAINS, MICRO, TUNERS)

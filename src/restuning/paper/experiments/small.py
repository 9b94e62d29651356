"""The small edition: the paper's comparisons on real and generated data that two CPU cores can carry.

ViT-Ti/16 of ImageNet; 1,000 training images a task, of which 200 choose the rate, the same for every seed and method.
`{root}` holds `vit_tiny_patch16_224_in1k`, `caltech101` and `eurosat`. What reads features: six tasks on two backbones,
few shots, altered copies, at 224 pixels. Every method, also what needs the backbone in every step: three tasks, one of
each of VTAB's groups, at 96 pixels and few epochs.
"""

from typing import Any

from restuning.paper.experiments.spec import Data, Experiment, Row, residual

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

_BOTH: dict[str, Any] = {"horizontal": {"tuner": "adapter"}, "vertical": {"tuner": "adapter"}}


def _bypass(**options: Any) -> dict[str, Any]:
    return {"kind": "bypass", **_BOTH, **options}


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

OPTIONS = (
    Row("bypass, λ from 0.9", _bypass(gate=0.9), {}),
    Row("bypass, λ by channel", _bypass(gates="channel"), {}),
    Row("bypass, normed", _bypass(normed=True), {}),
    Row("bypass, normed, λ from 0.9, by channel", _bypass(normed=True, gate=0.9, gates="channel"), {}),
    Row("bypass-grid2, normed, λ from 0.9, by channel", _bypass(normed=True, gate=0.9, gates="channel", grid=2), {}),
)
"""What was tried where the bypass does not win."""

_DUAL = residual(mha="adapter", ffn="adapter")["tuners"]
_WITH_SSF: dict[str, Any] = {"kind": "residual", "tuners": {**_DUAL, "affine": {"tuner": "ssf"}}}
_HEADS = tuple(row for row in BESIDE if row.name in ("linear", "bypass-none", "bypass", "bypass-grid2"))
_THREE = tuple(task for task in TASKS if task.name in ("Caltech-101", "EuroSAT", "sprite location"))

TUNERS = (
    *BESIDE,
    *OPTIONS,
    Row("bypass-grid4", "bypass-grid4", {}),
    *(
        Row(f"{name}, head on the mean", method, {}, lrs=(0.005,), pool="mean")
        for name, method in (
            ("linear", "linear"),
            ("bypass", "bypass"),
            ("lst", "lst"),
            ("bypass of convolutions", _bypass(horizontal={"tuner": "convpass"}, vertical={"tuner": "convpass"})),
        )
    ),
    Row("lst", "lst", {}, lrs=(0.005,)),
    Row("dtl", "dtl", {}, lrs=(0.005,), epochs=(16,)),
    Row("side-tuning", "side-tuning", {}, lrs=(0.001,), epochs=(8,)),
    *(
        Row(name, method, {}, lrs=(lr,), epochs=(8,), seeds=(0,))
        for name, method, lr in (
            ("res-tuning", "res-tuning", 0.005),
            ("Res-Prefix on MHA, Res-Adapter on FFN", residual(mha="prefix", ffn="adapter"), 0.005),
            ("res-tuning with SSF", _WITH_SSF, 0.005),
            ("lora", "lora", 0.005),
            ("adapter", "adapter", 0.005),
            ("ssf", "ssf", 0.005),
            ("vpt-deep", "vpt-deep", 0.005),
            ("full", "full", 0.0002),
        )
    ),
)

_PROBES = (
    Row("linear", "linear", {}),
    Row("bypass", "bypass", {}),
    Row("linear-all", "linear-all", {}),
    Row("linear-all-gated", "linear-all-gated", {}),
)


def _mixers(*lrs: float) -> tuple[Row, ...]:
    """Side paths that mix tokens by attention; their rates."""
    methods: dict[str, Any] = {
        "bypass-query": "bypass-query",
        "bypass-query, gated read-out": {"kind": "bypassquery", "readout": "gated"},
        "bypass-attention": "bypass-attention",
    }
    return tuple(Row(name, method, {}, lrs=lrs, epochs=(20,)) for name, method in methods.items())


_NEIGHBOURS = tuple(
    Row(name, name, {}, lrs=(0.005, 0.002), epochs=(20,)) for name in ("last", "losa", "mist", "unipt", "sherl", "vqt")
)
_RATES = (0.01, 0.005, 0.002)
_SAME_RATES = Row("bypass-query, at the rates of those inside", "bypass-query", {}, lrs=_RATES, epochs=(20,))
_INSIDE = (
    *(Row(name, name, {}, lrs=_RATES, epochs=(20,)) for name in ("ssf", "res-tuning", "lora")),
    Row("res-tuning with SSF", _WITH_SSF, {}, lrs=_RATES, epochs=(20,)),
    Row("full", "full", {}, lrs=(0.0005, 0.0002), epochs=(20,)),
)
"""Inside the backbone, with the care of the paths beside it."""


def _dual(**settings: Any) -> dict[str, Any]:
    """Res-Adapters on MHA and FFN, with other settings."""
    return {"kind": "residual", "tuners": {op: {**tuner, **settings} for op, tuner in _DUAL.items()}}


_VARIED = (
    *(
        Row(name, method, {}, lrs=_RATES, epochs=(20,))
        for name, method in (
            ("Res-Prefix on MHA, Res-Adapter on FFN", residual(mha="prefix", ffn="adapter")),
            ("Res-Adapters on MHA, FFN and Block", "res-tuning-tri"),
            ("res-tuning, no channel scale", _dual(scale="none")),
            ("res-tuning, Xavier", _dual(init="xavier")),
            ("res-tuning, width 32", _dual(width=32)),
        )
    ),
    *(
        Row(
            f"res-tuning, the head at {factor:g} of the rate",
            "res-tuning",
            {},
            lrs=_RATES,
            epochs=(20,),
            head_lr_factor=factor,
        )
        for factor in (0.2, 5.0)
    ),
    *(Row(f"{name}, 60 epochs", name, {}, lrs=_RATES, epochs=(60,)) for name in ("ssf", "res-tuning")),
    Row("dtl, head on the mean", "dtl", {}, lrs=(0.005, 0.002), epochs=(20,), pool="mean"),
)
"""Of Res-Tuning what might bring more, and a peer that reads another token."""

_LAST: tuple[Row, ...] = (
    Row("linear-all, the last layer", {"kind": "linearall", "last": 1}, {}),
    Row("linear-all, the last three", {"kind": "linearall", "last": 3}, {}),
    Row(
        "bypass-query, read-out of the last layer",
        {"kind": "bypassquery", "readout_last": 1},
        {},
        lrs=(0.003,),
        epochs=(20,),
    ),
)
"""Read-outs of fewer layers."""

_SHOTS = (1, 2, 4, 8, 16)
_ALTERED = Data(
    "Caltech-101",
    f"part:1000,800:{_CALTECH}",
    test=4 * 800,
    targets={how: f"altered:{how}:part:1000,800:{_CALTECH}" for how in ("corrupted", "sketched", "rotated")},
)
_GRID: dict[str, Any] = {"lrs": (0.01, 0.003), "epochs": (30,)}
_CARE: dict[str, Any] = {"lrs": (0.01, 0.003, 0.001), "epochs": (20, 40), "label_smoothing": 0.1}

EXPERIMENTS = (
    Experiment(
        "small-features",
        "The small edition: what reads features, six tasks, 224 pixels",
        COLUMNS,
        BESIDE,
        TASKS,
        **_TI,
        **_GRID,
    ),
    Experiment(
        "small-side",
        "The small edition: side paths that mix tokens, six tasks, 224 pixels",
        COLUMNS,
        (*_PROBES, *_mixers(0.003), *_INSIDE),
        TASKS,
        **_TI,
        **_CARE,
        note="labels smoothed by 0.1; rate and length chosen on validation, what mixes tokens: one rate, 20 epochs",
    ),
    Experiment(
        "small-side-96",
        "The small edition: side paths that mix tokens, three tasks, 96 pixels",
        (*(task.name for task in _THREE), "All"),
        (*_PROBES, *_mixers(0.005, 0.002), _SAME_RATES, *_NEIGHBOURS, *_INSIDE, *_VARIED),
        _THREE,
        **_TI,
        **_CARE,
        image_size=96,
        note="labels smoothed by 0.1; rate and length chosen on validation, what mixes tokens: its rate, of 20 epochs",
    ),
    Experiment(
        "small-side-pixels",
        "The small edition: what more pixels are worth to a side path, three tasks",
        (*(task.name for task in _THREE), "All"),
        tuple(
            Row(f"bypass-query, {side} pixels", "bypass-query", {}, lrs=(0.003,), epochs=(20,), image_size=side)
            for side in (96, 128, 160, 192)
        ),
        _THREE,
        **_TI,
        **_CARE,
        note="one rate, 20 epochs, labels smoothed by 0.1; at 224 pixels: small-side",
    ),
    Experiment(
        "small-fewshot",
        "The small edition: few shots of Caltech-101",
        tuple(f"Caltech-101, {k}" for k in _SHOTS),
        _HEADS,
        tuple(Data(f"Caltech-101, {k}", _CALTECH, "Caltech-101", 102 * k, 802, shots=k) for k in _SHOTS),
        **_TI,
        lrs=(0.005,),
        epochs=(50,),
    ),
    Experiment(
        "small-domains",
        "The small edition: Caltech-101, tested on corrupted, sketched and rotated copies",
        ("Caltech-101", "corrupted", "sketched", "rotated", "All"),
        (*_HEADS, *OPTIONS),
        (_ALTERED,),
        **_TI,
        **_GRID,
        note="All: the mean of the three altered copies",
    ),
    Experiment(
        "small-side-domains",
        "The small edition: side paths that mix tokens, tested on corrupted, sketched and rotated copies",
        ("Caltech-101", "corrupted", "sketched", "rotated", "All"),
        (*_PROBES, *_mixers(0.003), *_LAST),
        (_ALTERED,),
        **_TI,
        lrs=(0.01, 0.003),
        epochs=(20,),
        label_smoothing=0.1,
        note="All: the mean of the three altered copies; labels smoothed by 0.1; rate chosen on validation, what mixes "
        "tokens: one rate",
    ),
    Experiment(
        "small-micro",
        "The small edition on restuning-micro, where it was not trained on the task",
        (*(task.name for task in TASKS[1:]), "Group", "All"),
        BESIDE,
        TASKS[1:],
        backbone="restuning-micro",
        **_GRID,
    ),
    Experiment(
        "small-tuners",
        "The small edition: every method, three tasks, 96 pixels",
        (*(task.name for task in _THREE), "All"),
        TUNERS,
        _THREE,
        **_TI,
        **_GRID,
        image_size=96,
        note="inside the backbone: one seed, one rate, 8 epochs; dtl: one rate, 16 epochs; lst, and heads on the mean "
        "of the patches: one rate",
    ),
)

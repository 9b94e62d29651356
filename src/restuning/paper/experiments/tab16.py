"""Table 16: convolutional backbones on CIFAR-100."""

from restuning.paper.experiments.spec import CIFAR, FULL_RATES, Experiment, Row

COLUMNS = ("CIFAR-100", "parameters_M", "memory_GB")

_CNNS = {"ConvNeXt": "convnext_base.fb_in22k", "ResNet-101": "resnet101.a1_in1k"}
_METHODS = {
    "Full": ("full", (90.15, 87.67, 11.16), (77.4, 42.7, 7.3)),
    "Linear": ("linear", (90.06, 0.11, 3.36), (54.96, 0.2, 2.83)),
    "Res-Tuning": ("res-tuning", (90.86, 0.87, 9.45), (86.8, 0.92, 7.2)),
    "Res-Tuning-Bypass": ("bypass", (90.51, 1.13, 3.63), (72.27, 3.63, 4.05)),
}

ROWS = tuple(
    Row(
        f"{cnn}, {name}",
        method,
        dict(zip(COLUMNS, values[i], strict=True)),
        lrs=FULL_RATES if method == "full" else None,
        backbone=backbone,
    )
    for i, (cnn, backbone) in enumerate(_CNNS.items())
    for name, (method, *values) in _METHODS.items()
)

EXPERIMENT = Experiment("tab16", "Table 16: convolutional backbones on CIFAR-100", COLUMNS, ROWS, (CIFAR,))

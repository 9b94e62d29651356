"""Table 6: text-to-image on COCO 2017; rows are runs of `restuning train-diffusion`, judged by `restuning score`."""

from restuning.paper.experiments.spec import Experiment, Row

COLUMNS = ("FID", "parameters_M", "memory_GB", "hours_per_epoch")

_TRAIN = "restuning train-diffusion --base sd-v1-5 --data coco:DATA/coco2017/annotations/captions_train2017.json"

_VALUES = {
    "SD v1.5": (None, 15.48, None, None, None),
    "Full": ("full", 14.85, 862.0, 72.77, 1.98),
    "LoRA": ("lora", 14.5, 9.96, 61.03, 1.42),
    "Adapter": ("adapter", 14.73, 2.51, 54.3, 1.3),
    "Prefix": ("prefix", 15.36, 4.99, 64.91, 2.2),
    "Prompt": ("prompt", 14.9, 1.25, 63.7, 2.17),
    "Res-Tuning": ("res-tuning", 13.96, 2.54, 54.49, 1.38),
    "Res-Tuning Bypass": ("bypass", 14.89, 3.76, 21.35, 0.82),
}

ROWS = tuple(
    Row(
        name,
        method,
        dict(zip(COLUMNS, values, strict=True)),
        command=f"{_TRAIN} --method {method} --out runs/tab6/{method}" if method else "",
    )
    for name, (method, *values) in _VALUES.items()
)

EXPERIMENT = Experiment(
    "tab6",
    "Table 6: Stable Diffusion v1.5 on COCO captions",
    COLUMNS,
    ROWS,
    margin=0.5,
    command=f"{_TRAIN} --method NAME --out runs/tab6/NAME",
)

"""The introduction: what the bypass saves of full fine-tuning."""

from restuning.paper.experiments.spec import Experiment, Row

ROWS = (
    Row(
        "training memory saved, ViT-B/16",
        "bypass",
        {"saved": 0.497},
        command="restuning bench memory --backbone vit_base_patch16_224 --method full bypass --out runs/intro",
    ),
    Row("training memory saved, Stable Diffusion", "bypass", {"saved": 0.707}),
    Row("training time saved, Stable Diffusion", "bypass", {"saved": 0.586}),
)

EXPERIMENT = Experiment(
    "intro", "The introduction: saved of full fine-tuning", ("saved",), ROWS, margin=0.05, command=ROWS[0].command
)

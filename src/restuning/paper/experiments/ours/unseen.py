"""Two tasks that nothing here was chosen on: what reads the features of a ViT-Ti/16, at 224 pixels.

Which of eight categories an emoji is of, without those that are another one in another skin tone, and which of six
scales a sprite has. The settings are those of `small-side`, the side paths of the small edition's six tasks.
"""

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from restuning.errors import DataError, RestuningError
from restuning.features.bank.format import MANIFEST
from restuning.paper.experiments.measured import Place, mean, table
from restuning.paper.results import Record, where
from restuning.runs.banks import BankSettings, build_bank
from restuning.runs.sweep import SWEEP, Sweep, sweep
from restuning.training.config import TrainConfig
from restuning.utils.files import atomic_write
from restuning.utils.reading import read_json

PROBES: dict[str, Any] = {"lrs": (0.01, 0.003, 0.001), "epochs": (20, 40)}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("first", PROBES),
    "bypass": ("first", PROBES),
    "linear-all": ("pca:64", PROBES),
    "bypass-query": ("pca:64", {"lrs": (0.003,), "epochs": (20,)}),
}
"""Method → what its bank holds, and its grid."""
TASKS = {
    "emoji category": "part:1000,300:tar:{out}/emoji.tar",
    "sprite scale": "part:1000,1000:sprites:scale",
}
CATEGORIES = ("people", "symbols", "flags", "objects", "nature", "activity", "travel", "food")
SKIN_TONE = re.compile("-1f3f[b-f]")


@dataclass(frozen=True)
class Unseen:
    """Four methods on two tasks.

    Args:
        rows: methods, between spaces; empty: all.
        seeds: how many, from 0.
    """

    rows: str = ""
    seeds: int = 3

    def __post_init__(self) -> None:
        for name in self.rows.split():
            if name not in ROWS:
                raise RestuningError(f"rows {name!r}: expected of {', '.join(ROWS)}")

    def run(self, place: Place) -> Iterator[Record]:
        for task, data in TASKS.items():
            for method in self.rows.split() or ROWS:
                tokens, grid = ROWS[method]
                bank = _bank(place, task, data, tokens)
                folder = place.out / "sweeps" / f"{method}-{task.replace(' ', '-')}"
                settings = Sweep(
                    str(bank),
                    (method,),
                    seeds=tuple(range(self.seeds)),
                    training=TrainConfig(label_smoothing=0.1),
                    **grid,
                )
                done = (folder / SWEEP).exists()
                found: Any = read_json(folder / SWEEP) if done else sweep(settings, folder, resume=folder.exists())
                row = found["methods"][method]
                about = {"task": task, "row": method, "parameters": row["parameters"], "seconds": row["seconds"]}
                for one in row["seeds"]:
                    score = {"test_accuracy": one["test_score"], "lr": one["lr"], "epochs": one["epochs"]}
                    yield {**about, **where(), "seed": one["seed"], **score}

    def text(self, records: Sequence[Record]) -> str:
        rows = []
        for method in ROWS:
            cells = [[r["test_accuracy"] for r in records if (r["row"], r["task"]) == (method, t)] for t in TASKS]
            if any(cells):
                sizes = {f"{r['parameters']['trainable']:,}" for r in records if r["row"] == method}
                rows.append([method, *(mean(of) if of else "" for of in cells), " and ".join(sorted(sizes))])
        return f"""# Two tasks that nothing was chosen on

An ImageNet ViT-Ti/16 at 224 pixels, 1,000 training images a task, from banks in float16, of 64 components where tokens
are read. Which of eight categories an emoji is of (300 test pictures; none is another one in another skin tone), and
which of six scales a sprite has (1,000). The settings are those of the [side paths](small-side/report.md), which were
chosen on six other tasks: labels smoothed by 0.1; rates 0.01, 0.003, 0.001 and 20 or 40 epochs by validation,
`bypass-query` one rate, 0.003, and 20 epochs; tested once, at the last epoch; accuracy in percent, mean ± standard
deviation over {self.seeds} seeds.

{table(["method", *TASKS, "trained parameters"], rows)}"""


def _bank(place: Place, task: str, data: str, tokens: str) -> Path:
    out = place.out / "banks" / f"{task} {tokens}".replace(" ", "-").replace(":", "")
    if not (out / MANIFEST).exists():
        if "emoji" in task and not (place.out / "emoji.tar").exists():
            atomic_write(place.out / "emoji.tar", _by_category(Path(place.data) / "captions_emojione"))
        settings = BankSettings(
            data=data.replace("{out}", str(place.out)),
            backbone="vit_tiny_patch16_224",
            weights=f"{place.data}/vit_tiny_patch16_224_in1k/model.safetensors",
            tokens=tokens,
            dtype="float16",
        )
        build_bank(settings, out, resume=True, progress=False)
    return out


def _by_category(folder: Path) -> bytes:
    """A tar of category/picture."""
    for name in ("emoji.json", "emojione_png64.tar"):
        if not (folder / name).is_file():
            raise DataError(f"no {name} in {folder}")
    named = json.loads((folder / "emoji.json").read_text("utf-8"))
    category = {one["unicode"]: one["category"] for one in named.values()}
    made = BytesIO()
    with tarfile.open(folder / "emojione_png64.tar") as pictures, tarfile.open(fileobj=made, mode="w") as out:
        for member in sorted(pictures, key=lambda member: member.name):
            group = category.get(Path(member.name).stem)
            if group in CATEGORIES and not SKIN_TONE.search(member.name):
                info = tarfile.TarInfo(f"{group}/{Path(member.name).name}")
                info.size = member.size
                out.addfile(info, pictures.extractfile(member))
    return made.getvalue()

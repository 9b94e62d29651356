"""An adapter on its way to a hub: the card that says what it is, and the upload."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from restuning.errors import CheckpointError, MissingExtra, line
from restuning.model.files import AdapterConfig
from restuning.utils.files import atomic_write
from restuning.utils.hub import HUB, hub

if TYPE_CHECKING:
    from restuning.model.tuned import Tuned

README = "README.md"
_TASKS = {"single-label": "classification", "multi-label": "classification", "per-token": "token-classification"}


def card(config: AdapterConfig, parameters: int, where: str) -> str:
    """The README.md of an adapter, as hubs read it: metadata, what it is, and the lines that load it.

    Args:
        config: of the adapter.
        parameters: that were trained.
        where: the folder or hub id that the lines load.
    """
    name, texts = str(config.backbone["name"]), "tokenizer" in (config.preprocessing or {})
    task = _TASKS.get(config.kind)
    if task == "classification":
        task = "text-classification" if texts else "image-classification"
    about = {"library_name": "restuning", "tags": ["restuning", "parameter-efficient fine-tuning"]}
    about |= {"base_model": name.removeprefix("hf:").removeprefix(HUB)} if "/" in name else {}
    about |= {"pipeline_tag": task} if task else {}
    classes = ", ".join(map(str, (config.classes or ())[:20])) + (", …" if len(config.classes or ()) > 20 else "")
    rows = {
        "backbone": f"`{name}`, frozen: its weights are not here",
        "method": f"`{config.method or json.dumps(config.spec)}`",
        "trained parameters": f"{parameters:,}",
        "task": config.kind,
        "classes": f"{config.num_classes}" + (f": {classes}" if classes else ""),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
{chr(10).join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in about.items())}
---

# An adapter of restuning

|  |  |
|---|---|
{table}

```python
import restuning as rt

backbone = rt.load_backbone({json.dumps(name)})
tuned = rt.Tuned.from_pretrained(backbone, {json.dumps(where)})
```
"""


def write_card(tuned: "Tuned", folder: Path, name: str, where: str | None = None) -> None:
    """README.md beside the adapter in `folder`. Raises CheckpointError if it cannot be written."""
    parameters = sum(p.numel() for p in tuned.adapter(name).parameters())
    try:
        atomic_write(folder / README, card(tuned.adapter_config(name), parameters, where or str(folder)).encode())
    except OSError as error:
        raise CheckpointError(f"cannot write {folder / README}: {error.strerror or error}") from error


def push(repo_id: str, save: Callable[[Path], None], *, private: bool) -> str:
    """Save into a temporary folder and upload it. Raises CheckpointError if the hub refuses."""
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise MissingExtra("huggingface_hub", "hub") from error
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        api = HfApi()
        try:
            with hub():
                api.create_repo(repo_id, private=private, exist_ok=True)
                return str(api.upload_folder(repo_id=repo_id, folder_path=folder))
        except Exception as error:
            raise CheckpointError(f"the hub did not take {repo_id}: {line(error)}") from error

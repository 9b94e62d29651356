"""What an adapter is on disk: adapter_config.json beside adapter_model.safetensors, and its way to and from a hub."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from restuning._version import __version__
from restuning.backbones.sites import Sites
from restuning.errors import CheckpointError, MethodError, MissingExtra, line
from restuning.methods.files import from_dict
from restuning.methods.spec import Method
from restuning.utils.files import as_json, atomic_write
from restuning.utils.hub import hub
from restuning.utils.plain import from_plain

if TYPE_CHECKING:
    from restuning.model.tuned import Tuned

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
FORMAT = "restuning/1"


@dataclass(frozen=True)
class AdapterConfig:
    """What is written beside the tensors. `spec` is the method as data, `method` its name if it had one."""

    method: str | None
    spec: Mapping[str, Any]
    backbone: Mapping[str, Any]
    pool: str
    num_classes: int | None
    classes: Sequence[Any] | None = None
    preprocessing: Mapping[str, Any] | None = None
    kind: str = "single-label"


def check_config(config: AdapterConfig) -> None:
    """Raises MethodError for what no file can hold."""
    try:
        as_json(asdict(config))
    except (TypeError, ValueError) as error:
        raise MethodError(f"what is saved beside the adapter is plain data: {error}") from error


def write(folder: Path, config: AdapterConfig, state: Mapping[str, Tensor]) -> None:
    """Both files, each whole or not at all. Raises CheckpointError if the folder cannot be written."""
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise MissingExtra("safetensors", "cli") from error
    described = as_json({"format": FORMAT, "restuning_version": __version__, **asdict(config)})
    tensors = save({key: value.detach().cpu().clone().contiguous() for key, value in state.items()})
    try:
        atomic_write(folder / MODEL, tensors)
        atomic_write(folder / CONFIG, described)
    except OSError as error:
        raise CheckpointError(f"cannot write the adapter to {folder}: {error.strerror or error}") from error


def read(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The card and the tensors. Raises CheckpointError that says which file is missing, damaged or foreign."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise MissingExtra("safetensors", "cli") from error
    config, model = read_config(folder), folder / MODEL
    try:
        return config, load(model.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no saved adapter: it has no {MODEL}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{model} is damaged: {error}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror or error}") from error


def read_config(folder: Path) -> AdapterConfig:
    """The card alone. Raises CheckpointError as `read` does."""
    config = folder / CONFIG
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no saved adapter: it has no {CONFIG}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{config} is damaged: {error}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror or error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format", data.get("peft_type", "none")) if isinstance(data, dict) else "none"
        raise CheckpointError(f"{config} is not of this library: its format is {found!r}, expected {FORMAT!r}")
    held = {f.name: data[f.name] for f in fields(AdapterConfig) if f.name in data}  # the rest is of the file
    return from_plain(AdapterConfig, held, str(config), CheckpointError)


def changes_the_base(folder: Path) -> bool:
    """Whether a saved adapter is full fine-tuning, which holds a backbone's weights."""
    return read_config(folder).spec.get("kind") == "full"


def fetch(path: str | Path, revision: str | None = None) -> Path:
    """A folder as it is, or the local copy of a hub repository. Raises CheckpointError if neither is there."""
    if Path(path).exists() or not _hub_id(str(path)):
        if not Path(path).is_dir():
            raise CheckpointError(f"no saved adapter at {path}: expected a folder with {CONFIG} and {MODEL}")
        return Path(path)
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise MissingExtra("huggingface_hub", "hub") from error
    try:
        with hub():
            for file in (MODEL, CONFIG):
                local = hf_hub_download(str(path), file, revision=revision)
    except Exception as error:
        raise CheckpointError(f"no folder {path}, and the hub gave no adapter of that name: {line(error)}") from error
    return Path(local).parent


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


def name_of(backbone: nn.Module) -> str:
    """What a backbone calls itself: timm's architecture, transformers' path, else its class."""
    timm = getattr(backbone, "pretrained_cfg", None)
    config = getattr(backbone, "config", None)
    if isinstance(timm, Mapping) and timm.get("architecture"):
        return str(timm["architecture"])
    return str(getattr(config, "_name_or_path", "") or type(backbone).__name__)


def fingerprint_of_blocks(backbone: nn.Module, sites: Sites) -> list[float] | None:
    """By which a backbone's blocks are told from those of other weights: heads and poolers come and go."""
    return fingerprint_of(nn.ModuleList(backbone.get_submodule(path) for path in sites.blocks))


def save_adapter(tuned: "Tuned", folder: Path, name: str) -> None:
    """Write one adapter, and under full fine-tuning the backbone's weights with it."""
    adapter = tuned.adapter(name)
    state = adapter.state_dict()
    if adapter.full:
        state |= {f"backbone.{key}": value for key, value in tuned.backbone.state_dict().items()}
    write(folder, adapter.config, state)


def check_adapter(tuned: "Tuned", folder: Path) -> None:
    """Raises CheckpointError for a saved adapter of another backbone, by its adapter_config.json."""
    made, sites = read_config(folder).backbone, tuned.sites
    if (made.get("width"), made.get("depth")) != (sites.info.out_features, len(sites.blocks)):
        raise CheckpointError(
            f"{folder}: made for {made.get('name')} (width {made.get('width')}, {made.get('depth')} blocks); "
            f"this is {tuned.backbone_name} (width {sites.info.out_features}, {len(sites.blocks)} blocks)"
        )
    # files of older versions have the fingerprint of the whole backbone
    mine = (tuned.fingerprint, fingerprint_of(tuned.backbone))
    if not any(same_weights(made.get("fingerprint"), one) for one in mine if one is not None or one is mine[0]):
        raise CheckpointError(
            f"{folder}: made for {made.get('name')} with other weights than this {tuned.backbone_name}"
        )


def load_adapter(
    tuned: "Tuned", path: str | Path, name: str, method: Method | None = None, revision: str | None = None
) -> None:
    """Add a saved adapter; see `Tuned.load_adapter`."""
    folder, active = fetch(path, revision), tuned.active_adapters
    check_adapter(tuned, folder)
    config, state = read(folder)
    try:
        tuned.add_adapter(
            name,
            method if method is not None else from_dict(config.spec),
            config.num_classes,
            pool=config.pool,
            classes=config.classes,
            preprocessing=config.preprocessing,
            kind=config.kind,
        )
    except MethodError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    adapter = tuned.adapter(name)
    adapter.config = config
    own = {key: value for key, value in state.items() if not key.startswith("backbone.")}
    wrong = _mismatch(adapter.state_dict(), own)
    if wrong:
        tuned.delete_adapter(name)
        tuned.active_adapters = active
        raise CheckpointError(f"{folder}: the tensors do not fit the method it names: {wrong}")
    adapter.load_state_dict(own)
    if adapter.full:
        tuned.backbone.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items() if k not in own})


def _mismatch(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """The first difference in names or shapes, in words; empty if there is none."""
    for key in sorted(expected.keys() | found.keys()):
        if key not in found:
            return f"{key} is missing"
        if key not in expected:
            return f"{key} is not expected"
        if expected[key].shape != found[key].shape:
            return f"{key} is {tuple(found[key].shape)}, expected {tuple(expected[key].shape)}"
    return ""


def fingerprint_of(backbone: nn.Module) -> list[float] | None:
    """32 of the backbone's weights, evenly spread, by which other weights are told apart; None without weights."""
    tensors = [p.detach() for p in backbone.parameters() if p.numel() > 1]
    if not tensors or any(p.is_meta for p in tensors):
        return None
    picks = [tensors[i * (len(tensors) - 1) // 31].flatten() for i in range(32)]
    return [round(float(p[(len(p) - 1) * i // 31]), 8) for i, p in enumerate(picks)]


def same_weights(a: Sequence[float] | None, b: Sequence[float] | None) -> bool:
    """Equal up to a cast to half precision; unknown weights are not told apart."""
    if a is None or b is None:
        return True
    return len(a) == len(b) and torch.allclose(torch.tensor(a), torch.tensor(b), rtol=1e-2, atol=1e-4)


def _hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith("/")

"""What an adapter is on disk: adapter_config.json beside adapter_model.safetensors, and its way to and from a hub."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from restuning._version import __version__
from restuning.backbones.load import check_finite as check_finite
from restuning.backbones.quantised import is_quantised
from restuning.backbones.sites import Sites
from restuning.errors import CheckpointError, MethodError, MissingExtra, RestuningError, line
from restuning.methods.files import from_dict
from restuning.methods.spec import Full, Method, grid_of
from restuning.utils.files import alone_in, as_json, sync_folder, write_beside
from restuning.utils.hub import HUB, hub, located
from restuning.utils.plain import from_plain
from restuning.utils.reading import number, read_bytes, read_json

if TYPE_CHECKING:
    from restuning.model.tuned import Tuned

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
FORMAT = "restuning/1"
DIGEST = "tensors_sha256"
CONFIG_BYTES = 64 * 2**20
MOST_CLASSES, MOST_SIZE = 2_000_000, 1_000_000


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
    check_finite(state, "the adapter")
    tensors = save({key: value.detach().cpu().clone().contiguous() for key, value in state.items()})
    described = {"format": FORMAT, "restuning_version": __version__, **asdict(config), DIGEST: _digest(tensors)}
    write_pair(folder, as_json(described), tensors)


def write_pair(folder: Path, config: bytes, tensors: bytes) -> None:
    """The two files of an adapter as one: whoever reads them, and whenever the power goes, it is the old two or the new
    two. The tensors are put down under the name of their digest; the move of the configuration, which names the digest,
    makes them the adapter's; then they take their own name. Raises CheckpointError if the folder cannot be written."""
    pending = _pending(folder, _digest(tensors))
    temporary: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder):
            try:
                temporary = [write_beside(folder / MODEL, tensors), write_beside(folder / CONFIG, config)]
                for name in (MODEL, CONFIG):
                    if (folder / name).is_dir():
                        raise IsADirectoryError(0, f"{name} is a folder there")
                temporary[0].replace(pending)
                try:
                    temporary[1].replace(folder / CONFIG)
                except OSError:
                    pending.unlink()
                    raise
                pending.replace(folder / MODEL)
                sync_folder(folder)
                for left in folder.glob(f"{MODEL}.*.pending"):  # of a process that was killed
                    left.unlink()
            finally:
                for file in temporary:
                    file.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot write the adapter to {folder}: {error.strerror or error}") from error


def _digest(tensors: bytes) -> str:
    return hashlib.sha256(tensors).hexdigest()


def _pending(folder: Path, digest: str) -> Path:
    """Where the tensors of a configuration are until they have taken their own name."""
    return folder / f"{MODEL}.{digest[:16]}.pending"


def read(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The card and the tensors. Raises CheckpointError that says which file is missing, damaged or foreign."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load
    except ImportError as error:
        raise MissingExtra("safetensors", "cli") from error
    model = folder / MODEL
    try:
        for _ in range(3):  # where another process writes it meanwhile, both files are read again
            data = _read_card(folder)
            config, digest = _config(folder, data), data.get(DIGEST)
            pending = _pending(folder, digest) if isinstance(digest, str) and digest.isalnum() else model
            tensors = read_bytes(pending if pending.is_file() else model)
            if _digest(tensors) == digest:
                break
        state: dict[str, Tensor] = load(tensors)
        check_finite(state, str(model))
        return config, state
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no saved adapter: it has no {MODEL}") from error
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{model} is damaged: {line(error)}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror or error}") from error


def read_config(folder: Path) -> AdapterConfig:
    """The configuration alone. Raises CheckpointError as `read` does."""
    return _config(folder, _read_card(folder))


def _read_card(folder: Path) -> dict[str, Any]:
    config = folder / CONFIG
    try:
        data = read_json(config, CONFIG_BYTES)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no saved adapter: it has no {CONFIG}") from error
    except ValueError as error:
        raise CheckpointError(f"{config} is damaged: {line(error)}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror or error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format", data.get("peft_type", "none")) if isinstance(data, dict) else "none"
        raise CheckpointError(f"{config} is not of this library: its format is {found!r}, expected {FORMAT!r}")
    return data


def _config(folder: Path, data: Mapping[str, Any]) -> AdapterConfig:
    """The configuration, every part of it of its type and within its bounds."""
    held = {f.name: data[f.name] for f in fields(AdapterConfig) if f.name in data}  # the rest is of the file
    found = from_plain(AdapterConfig, held, str(folder / CONFIG), CheckpointError)
    try:
        _check_values(held)
    except ValueError as error:
        raise CheckpointError(f"{folder / CONFIG} is damaged: {line(error)}") from error
    return found


def _check_values(data: Mapping[str, Any]) -> None:
    """Raises ValueError for what no adapter of ours says."""
    if data["method"] is not None and not isinstance(data["method"], str):
        raise ValueError(f"method is {data['method']!r}: expected a name, or none")
    if not isinstance(data["pool"], str) or not isinstance(data["kind"], str):
        raise ValueError("pool and kind: expected names")
    count, classes = data["num_classes"], data["classes"]
    if count is not None:
        number(count, 1, MOST_CLASSES, "num_classes", whole=True)
    if classes is not None and (
        not isinstance(classes, list)
        or len(classes) != count
        or not all(isinstance(name, str | int | float) for name in classes)
    ):
        raise ValueError(f"classes: expected a list of {count} names")
    if data["preprocessing"] is not None and not isinstance(data["preprocessing"], dict):
        raise ValueError("preprocessing: expected an object, or none")
    backbone = data["backbone"]
    for name in ("width", "depth"):
        number(backbone.get(name), 1, 2**31, f"the backbone's {name}", whole=True)
    if not isinstance(backbone.get("name"), str) or not backbone["name"]:
        raise ValueError("the backbone has no name")
    told = backbone.get("fingerprint")
    if told is not None:
        if not isinstance(told, list) or len(told) > 64:
            raise ValueError("the backbone's fingerprint: expected 32 numbers")
        for value in (value for value in told if value is not None):
            number(value, -1e38, 1e38, "a number of the backbone's fingerprint")
    _check_sizes(data["spec"])


def _check_sizes(value: Any) -> None:
    """Whole numbers of a method are sizes: none of them is a million."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            _check_sizes(one)
    elif isinstance(value, int) and not isinstance(value, bool):
        number(value, -MOST_SIZE, MOST_SIZE, "a size of the method", whole=True)


def changes_the_base(folder: Path) -> bool:
    """Whether a saved adapter is full fine-tuning, which holds a backbone's weights."""
    return read_config(folder).spec.get("kind") == "full"


def fetch(path: str | Path, revision: str | None = None, subfolder: str = "") -> Path:
    """A folder as it is, or the local copy of a hub repository (`hub:owner/name[@revision]`); of either, a folder below
    it. Raises CheckpointError if neither is there."""
    if subfolder and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise CheckpointError(f"subfolder {subfolder!r}: expected a folder below {path}")
    found = located(str(path)) if str(path).startswith(HUB) else Path(path)
    if isinstance(found, Path):
        found = path = found / subfolder
        if not found.is_dir():
            meant = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path))
            hint = f" (for the hub, write {HUB}{path})" if meant else ""
            raise CheckpointError(f"no saved adapter at {path}: expected a folder with {CONFIG} and {MODEL}{hint}")
        return found
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise MissingExtra("huggingface_hub", "hub") from error
    try:
        with hub():
            for file in (MODEL, CONFIG):
                name = f"{subfolder}/{file}" if subfolder else file
                local = hf_hub_download(found.repo, name, revision=revision or found.revision)
    except Exception as error:
        raise CheckpointError(f"no folder {path}, and the hub gave no adapter of that name: {line(error)}") from error
    return Path(local).parent


def name_of(backbone: nn.Module) -> str:
    """What a backbone calls itself: timm's architecture, transformers' path, else its class."""
    timm = getattr(backbone, "pretrained_cfg", None)
    config = getattr(backbone, "config", None)
    if isinstance(timm, Mapping) and timm.get("architecture"):
        return str(timm["architecture"])
    return str(getattr(config, "_name_or_path", "") or type(backbone).__name__)


def fingerprint_of_blocks(backbone: nn.Module, sites: Sites) -> list[float | None] | None:
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
    tuned: "Tuned",
    path: str | Path,
    name: str,
    method: Method | None = None,
    revision: str | None = None,
    subfolder: str = "",
    autocast_adapter_dtype: bool = True,
) -> None:
    """Add a saved adapter; see `Tuned.load_adapter`. All that can be refused is, before anything is changed."""
    folder, active = fetch(path, revision, subfolder), tuned.active_adapters
    check_adapter(tuned, folder)
    config, state = read(folder)
    own = {key: value for key, value in state.items() if not key.startswith("backbone.")}
    whole = {key.removeprefix("backbone."): value for key, value in state.items() if key not in own}
    try:
        spec = method if method is not None else from_dict(config.spec)
        if isinstance(spec, Full):
            wrong = _mismatch(tuned.backbone.state_dict(), whole)
        else:
            wrong = "backbone weights are not expected" if whole else ""
        if method is None and not wrong:
            wrong = _misfit(tuned, spec, config, own)
        if wrong:
            raise CheckpointError(f"{folder}: the tensors do not fit the method it names: {wrong}")
        tuned.add_adapter(
            name,
            spec,
            config.num_classes,
            pool=config.pool,
            classes=config.classes,
            preprocessing=config.preprocessing,
            kind=config.kind,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
    except CheckpointError:
        raise
    except (RestuningError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {line(error)}") from error
    adapter = tuned.adapter(name)
    adapter.config = config
    wrong = _mismatch(adapter.state_dict(), own)
    if wrong:
        tuned.delete_adapter(name)
        tuned.active_adapters = active
        raise CheckpointError(f"{folder}: the tensors do not fit the method it names: {wrong}")
    adapter.load_state_dict(own)
    if adapter.full:
        tuned.backbone.load_state_dict(whole)


def _misfit(tuned: "Tuned", spec: Method, config: AdapterConfig, found: Mapping[str, Tensor]) -> str:
    """The first difference between tensors that were read and those that the method has, in words. The method is built
    on the meta device: a size that is a lie takes no memory."""
    from restuning.hooks.tail import tail_of
    from restuning.model.adapter import AdapterModule

    pool = "none" if config.kind == "per-token" else config.pool
    pool = tail_of(tuned.backbone, tuned.sites, pool if grid_of(spec) is None else "flat").pool
    with torch.device("meta"):
        expected = AdapterModule(tuned.backbone, tuned.sites, spec, pool, config.num_classes, config)
    return _mismatch(expected.state_dict(), found)


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


def fingerprint_of(backbone: nn.Module) -> list[float | None] | None:
    """32 of the backbone's weights, evenly spread, by which other weights are told apart; None without weights. Of
    quantised weights None is told, whose values depend on how they are packed: norms and biases tell models apart."""
    tensors = [p.detach() for p in backbone.parameters() if p.numel() > 1]
    if not tensors or any(p.is_meta for p in tensors):
        return None
    picks = [tensors[i * (len(tensors) - 1) // 31] for i in range(32)]
    return [
        None if is_quantised(p) else round(float(p.flatten()[(p.numel() - 1) * i // 31]), 8)
        for i, p in enumerate(picks)
    ]


def same_weights(a: Sequence[float | None] | None, b: Sequence[float | None] | None) -> bool:
    """Equal up to a cast to half precision; unknown weights are not told apart."""
    if a is None or b is None:
        return True
    known = [(x, y) for x, y in zip(a, b, strict=False) if x is not None and y is not None]
    mine, other = torch.tensor(known).view(-1, 2).T
    return len(a) == len(b) and torch.allclose(mine, other, rtol=1e-2, atol=1e-4)

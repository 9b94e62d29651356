"""LoRA files as PEFT writes them, read and written."""

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from restuning.backbones.anatomy import PARTS
from restuning.backbones.sites import Sites
from restuning.errors import CheckpointError, MethodError, MissingExtra, line
from restuning.methods.spec import Method, Mix, Residual
from restuning.model.files import CONFIG, MODEL, fetch
from restuning.model.tuned import Tuned
from restuning.tuners import Lora
from restuning.tuners.lora import ConvLoraTuner, LoraTuner
from restuning.utils.files import atomic_write

_PLAIN = {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "lora_bias": False, "modules_to_save": None}
"""Settings of PEFT's that change what is computed, and the values at which they do not."""


def load_peft(
    tuned: Tuned, path: str | Path, name: str = "default", num_classes: int | None = None, *, pool: str | None = None
) -> None:
    """Add a LoRA adapter that PEFT saved, from a folder or a hub id, with a fresh head, and make it active.

    Raises CheckpointError for files that are damaged, of another method or variant, or of another backbone.
    """
    folder = fetch(path)
    config, state = _read(folder)
    found, places = _found(folder, tuned.sites, state)
    ranks: dict[tuple[str, int, float], list[int]] = {}
    for site_path, (a, _) in found.items():
        rank = len(a)
        alpha = float(_pattern(config.get("alpha_pattern"), places[site_path]) or config["lora_alpha"])
        alpha = alpha * rank**0.5 if config.get("use_rslora") else alpha
        site = next(s for s in tuned.sites.all if s.writes.path == site_path and s.op in PARTS)
        ranks.setdefault((site_path.split(".")[-1], rank, alpha), []).append(site.block or 0)
    dropout = float(config.get("lora_dropout") or 0.0)
    parts = tuple(
        Residual({tail: Lora(rank, alpha, dropout)}, blocks=tuple(blocks))
        for (tail, rank, alpha), blocks in ranks.items()
    )
    method: Method = parts[0] if len(parts) == 1 else Mix(parts)
    active = tuned.active_adapters
    tuned.add_adapter(name, method, num_classes, pool=pool)
    for place, site in tuned.adapter(name).sites.items():
        tuner: Any = tuned.adapter(name).tuners[place]
        a, b = found[site.writes.path]
        if (tuner.a.shape, tuner.b.shape) != (a.shape, b.shape):
            tuned.delete_adapter(name)
            tuned.active_adapters = active
            raise CheckpointError(
                f"{folder}: LoRA of {site.writes.path} is {tuple(a.shape)}, not {tuple(tuner.a.shape)}"
            )
        tuner.load_state_dict({"a": a, "b": b})


def save_peft(tuned: Tuned, path: str | Path, name: str | None = None) -> None:
    """Write the active (or the named) adapter as PEFT writes LoRA; the head is not part of it.

    Raises MethodError if any of its tuners is not LoRA, CheckpointError if the folder cannot be written.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise MissingExtra("safetensors", "cli") from error
    adapter = tuned.adapter(tuned.one(name))
    state: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    dropout = 0.0
    for place, site in adapter.sites.items():
        tuner = adapter.tuners[place]
        if not isinstance(tuner, LoraTuner | ConvLoraTuner) or adapter.side is not None:
            raise MethodError(f"PEFT's LoRA files hold LoRA alone; {place} is a {type(tuner).__name__}")
        if site.weight is not None:
            raise MethodError(f"PEFT's LoRA files name modules that are called; {place} is a weight used without one")
        if isinstance(tuner, ConvLoraTuner) and tuner.groups > 1:
            raise MethodError(f"PEFT's LoRA files hold no LoRA of a grouped convolution such as {site.writes.path}")
        key = f"base_model.model.{site.writes.path}"
        if f"{key}.lora_A.weight" in state:
            raise MethodError(f"PEFT's LoRA files hold one LoRA a module; {site.writes.path} has several")
        state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"] = (
            t.detach().cpu().contiguous() for t in (tuner.a, tuner.b)
        )
        ranks[site.writes.path], alphas[site.writes.path] = len(tuner.a), tuner.factor * len(tuner.a)
        dropout = tuner.dropout
    if not state:
        raise MethodError("PEFT's LoRA files hold LoRA alone; this adapter has none")
    first = next(iter(ranks))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": str(adapter.config.backbone.get("name")),
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "lora_dropout": dropout,
        "bias": "none",
        "target_modules": sorted(ranks),
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {path: alpha for path, alpha in alphas.items() if alpha != alphas[first]},
    }
    folder = Path(path)
    try:
        atomic_write(folder / MODEL, save(state))
        atomic_write(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"cannot write the adapter to {folder}: {error.strerror or error}") from error


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise MissingExtra("safetensors", "cli") from error
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        state = load((folder / MODEL).read_bytes())
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be read as a PEFT adapter: {line(error)}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise CheckpointError(f"{folder}: PEFT adapter of type {kind!r}, expected 'LORA'")
    for key, value in _PLAIN.items():
        if config.get(key) not in (None, value):
            raise CheckpointError(f"{folder}: PEFT's {key}={config[key]!r} is not plain LoRA")
    if str(config.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq")):
        raise CheckpointError(
            f"{folder}: PEFT's init_lora_weights={config['init_lora_weights']!r} changes the backbone's own weights: "
            "expected a file that PEFT converted to plain LoRA"
        )
    return config, state


def _found(
    folder: Path, sites: Sites, state: dict[str, Tensor]
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, str]]:
    """Site's path → (A, B), and → PEFT's own path: the model that it wrapped may have been inside a larger one, or ours
    may be."""
    paths = {site.writes.path for site in sites.all if site.op in PARTS}
    halves: dict[str, dict[str, Tensor]] = {}
    places: dict[str, str] = {}
    around: set[str] = set()
    for key, value in state.items():
        place, _, half = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        fits = [p for p in paths if p == place] or [
            p for p in paths if p.endswith(f".{place}") or place.endswith(f".{p}")
        ]
        if half not in ("A", "B") or not fits:
            raise CheckpointError(f"{folder}: {key} is no LoRA of an affine module of this backbone")
        path = max(fits, key=len)
        around.add(place.removesuffix(path) if len(place) > len(path) else "")
        if places.setdefault(path, place) != place or half in halves.get(path, {}):
            raise CheckpointError(f"{folder}: {place} and {places[path]} are both {path} of this backbone")
        halves.setdefault(path, {})[half] = value
    of_texts = [tower for tower in around if re.search(r"(text|language)_?(model|encoder|tower)?\.$", tower)]
    if len(around) > 1 or (of_texts and sites.anatomy.family != "text"):
        towers = ", ".join(sorted(tower.rstrip(".") or "none" for tower in around))
        raise CheckpointError(f"{folder}: LoRA of other parts of a larger model ({towers}) than this backbone")
    single = [path for path, both in halves.items() if both.keys() != {"A", "B"}]
    if single or not halves:
        raise CheckpointError(f"{folder}: {f'{single[0]} lacks a half' if single else 'no tensors'}")
    for path, both in halves.items():
        info = next(s.info for s in sites.all if s.writes.path == path and s.op in PARTS)
        if (both["A"].shape[1], len(both["B"])) != (info.in_features, info.out_features):
            raise CheckpointError(
                f"{folder}: LoRA of {path} is for widths {both['A'].shape[1]} and {len(both['B'])}; "
                f"this backbone has {info.in_features} and {info.out_features}"
            )
    return {path: (both["A"], both["B"]) for path, both in halves.items()}, places


def _pattern(patterns: dict[str, Any] | None, place: str) -> Any:
    """As PEFT looks it up: keys are regular expressions of the last part of a path."""
    return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", place)), None)

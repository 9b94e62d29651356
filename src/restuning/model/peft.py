"""LoRA files as PEFT writes them, read and written."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from restuning.backbones.anatomy import PARTS
from restuning.backbones.site import is_named
from restuning.backbones.sites import Sites
from restuning.errors import CheckpointError, MethodError, MissingExtra, RestuningError, line
from restuning.methods.spec import Method, Mix, Residual, residuals_of
from restuning.model.files import CONFIG, CONFIG_BYTES, MODEL, MOST_SIZE, check_finite, fetch, write_pair
from restuning.model.lora import lora_method
from restuning.model.tuned import Tuned
from restuning.tuners import Lora
from restuning.tuners.copied import CopiedModule
from restuning.tuners.lora import ConvLoraTuner, LoraTuner
from restuning.utils.files import as_json
from restuning.utils.reading import number, read_bytes, read_json

_PLAIN = {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "lora_bias": False}
"""Settings of PEFT's that change what is computed, and the values at which they do not."""


def load_peft(
    tuned: Tuned, path: str | Path, name: str = "default", num_classes: int | None = None, *, pool: str | None = None
) -> None:
    """Add a LoRA adapter that PEFT saved, from a folder or a hub id, with a fresh head, and make it active. Of its
    `modules_to_save` those that the backbone has are trained copies here.

    Raises CheckpointError for files that are damaged, of another method or variant, or of another backbone.
    """
    folder = fetch(path)
    config, state = _read(folder)
    saved = _saved_modules(folder, tuned, config, state)
    found, places = _found(folder, tuned.sites, {k: v for k, v in state.items() if ".lora_" in k})
    dropout, settings = float(config.get("lora_dropout") or 0.0), {}
    for site_path, (a, _) in found.items():
        rank = len(a)
        alpha = float(_pattern(config.get("alpha_pattern"), places[site_path]) or config["lora_alpha"])
        alpha = alpha * rank**0.5 if config.get("use_rslora") else alpha
        site = next(s for s in tuned.sites.all if s.writes.path == site_path and s.op in PARTS)
        settings[site] = Lora(rank, alpha, dropout)
    method: Method = lora_method(tuned.sites, settings)
    if saved:
        whole = tuple(f"re:{path.replace('.', '[.]')}" for path in saved)
        method = Mix((*residuals_of(method), Residual(modules_to_save=whole)))
    active = tuned.active_adapters
    try:
        tuned.add_adapter(name, method, num_classes, pool=pool)
    except (RestuningError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: {line(error)}") from error
    for place, site in tuned.adapter(name).sites.items():
        tuner: Any = tuned.adapter(name).tuners[place]
        if site.reads.path in saved:
            tuner.module.load_state_dict(saved[site.reads.path])
            continue
        a, b = found[site.writes.path]
        if (tuner.a.shape, tuner.b.shape) != (a.shape, b.shape):
            tuned.delete_adapter(name)
            tuned.active_adapters = active
            raise CheckpointError(
                f"{folder}: LoRA of {site.writes.path} is {tuple(a.shape)}, not {tuple(tuner.a.shape)}"
            )
        tuner.load_state_dict({"a": a, "b": b})


def save_peft(tuned: Tuned, path: str | Path, name: str | None = None) -> None:
    """Write the active (or the named) adapter as PEFT writes LoRA, trained copies of modules as its `modules_to_save`;
    the head is not part of it.

    Raises MethodError if any of its tuners is not LoRA, CheckpointError if the folder cannot be written.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise MissingExtra("safetensors", "cli") from error
    adapter = tuned.adapter(tuned.one(name))
    state: dict[str, Tensor] = {}
    ranks, alphas, dropout = {}, {}, 0.0
    saved: dict[str, dict[str, Tensor]] = {}
    for place, site in adapter.sites.items():
        tuner = adapter.tuners[place]
        if isinstance(tuner, CopiedModule):
            saved[site.reads.path] = tuner.module.state_dict()
            continue
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
    for module, own in saved.items():
        state |= {f"base_model.model.{module}.{key}": t.detach().cpu().contiguous() for key, t in own.items()}
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
        "modules_to_save": sorted(saved) or None,
        "rank_pattern": {path: rank for path, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {path: alpha for path, alpha in alphas.items() if alpha != alphas[first]},
    }
    folder = Path(path)
    check_finite(state, "the adapter")
    write_pair(folder, as_json(config), save(state))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise MissingExtra("safetensors", "cli") from error
    try:
        config = read_json(folder / CONFIG, CONFIG_BYTES)
        state = load(read_bytes(folder / MODEL))
    except Exception as error:
        raise CheckpointError(f"{folder} cannot be read as a PEFT adapter: {line(error)}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise CheckpointError(f"{folder}: PEFT adapter of type {kind!r}, expected 'LORA'")
    try:
        _check_values(config)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {CONFIG}: {line(error)}") from error
    check_finite(state, str(folder / MODEL))
    for key, value in state.items():
        if ".lora_" not in key and config.get("modules_to_save"):
            continue
        if value.ndim not in (2, 4) or not value.is_floating_point() or not value.numel():
            raise CheckpointError(f"{folder}: {key} is {tuple(value.shape)} of {value.dtype}: no half of a LoRA")
    for key, value in _PLAIN.items():
        if config.get(key) not in (None, value):
            raise CheckpointError(f"{folder}: PEFT's {key}={config[key]!r} is not plain LoRA")
    if str(config.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "loftq")):
        raise CheckpointError(
            f"{folder}: PEFT's init_lora_weights={config['init_lora_weights']!r} changes the backbone's own weights: "
            "expected a file that PEFT converted to plain LoRA"
        )
    return config, state


def _saved_modules(
    folder: Path, tuned: Tuned, config: dict[str, Any], state: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Path of a module of the backbone → what PEFT trained of it whole, its `modules_to_save`."""
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise CheckpointError(f"{folder}: modules_to_save is {names!r}: expected a list of names")
    saved: dict[str, dict[str, Tensor]] = {}
    for key, value in sorted(state.items()):
        if ".lora_" in key:
            continue
        place = key.removeprefix("base_model.model.")
        within = [i for i in range(len(place)) if place[i] == "." and any(is_named(place[:i], name) for name in names)]
        path = next((p for p, _ in tuned.backbone.named_modules() if within and place[: within[0]] == p), None)
        if path is None:
            raise CheckpointError(f"{folder}: {key} is neither LoRA nor of a module of this backbone")
        saved.setdefault(path, {})[place[within[0] + 1 :]] = value
    for path, own in saved.items():
        there = tuned.backbone.get_submodule(path).state_dict()
        if {k: v.shape for k, v in there.items()} != {k: v.shape for k, v in own.items()}:
            raise CheckpointError(f"{folder}: {path} has other tensors than this backbone's")
    return saved


def _check_values(config: dict[str, Any]) -> None:
    """Raises ValueError for what PEFT does not write."""
    number(config.get("lora_alpha"), -1e6, 1e6, "lora_alpha")
    if config.get("r") is not None:
        number(config["r"], 1, MOST_SIZE, "r", whole=True)
    if config.get("lora_dropout") is not None:
        number(config["lora_dropout"], 0, 0.999, "lora_dropout")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{name} is {patterns!r}: expected an object")
        for key, value in patterns.items():
            if not re.fullmatch(_PATTERN, key) or len(re.findall(r"[*+]", key)) > 3:
                raise ValueError(
                    f"{name}: {key[:60]!r} is no path of modules: expected names, points, | and three * at most"
                )
            number(value, -1e6, 1e6, f"{name} of {key}")


_PATTERN = r"[\w.\\|^$*+\[\]-]{1,1000}"
"""What a key of PEFT's patterns may hold. PEFT takes any regular expression; one of nested repetitions never returns:
there are no groups here, and few repetitions."""


def _found(
    folder: Path, sites: Sites, state: dict[str, Tensor]
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, str]]:
    """Site's path → (A, B), and → PEFT's own path: the model that it wrapped may have been inside a larger one, or ours
    may be."""
    paths = list(dict.fromkeys(site.writes.path for site in sites.all if site.op in PARTS))
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
        if len(both["A"]) != both["B"].shape[1]:
            ranks = f"{len(both['A'])} and {both['B'].shape[1]}"
            raise CheckpointError(f"{folder}: LoRA of {path} has halves of ranks {ranks}")
        if (both["A"].shape[1], len(both["B"])) != (info.in_features, info.out_features):
            raise CheckpointError(
                f"{folder}: LoRA of {path} is for widths {both['A'].shape[1]} and {len(both['B'])}; "
                f"this backbone has {info.in_features} and {info.out_features}"
            )
    ordered = {path: halves[path] for path in paths if path in halves}  # files have no order
    return {path: (both["A"], both["B"]) for path, both in ordered.items()}, places


def _pattern(patterns: dict[str, Any] | None, place: str) -> Any:
    """As PEFT looks it up: keys are regular expressions of the last part of a path."""
    try:
        return next((value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", place)), None)
    except re.error as error:
        raise CheckpointError(f"a pattern of PEFT's that cannot be read: {line(error)}") from error

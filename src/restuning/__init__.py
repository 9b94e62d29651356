"""Res-Tuning (NeurIPS 2023, arXiv 2310.19859): tuners unbound from a frozen backbone.

The public API, on one page. A name is imported when it is first used: `import restuning` itself needs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from restuning._version import __version__ as __version__

if TYPE_CHECKING:
    from restuning._types import Kernel as Kernel
    from restuning._types import SiteInfo as SiteInfo
    from restuning.backbones.anatomy import Anatomy as Anatomy
    from restuning.backbones.anatomy import Op as Op
    from restuning.backbones.anatomy import Weight as Weight
    from restuning.backbones.anatomy import into as into
    from restuning.backbones.anatomy import out_of as out_of
    from restuning.backbones.load import load_backbone as load_backbone
    from restuning.backbones.sites import find_sites as find_sites
    from restuning.data import load_task as load_task
    from restuning.errors import RestuningError as RestuningError
    from restuning.features.novelty import Novelty as Novelty
    from restuning.features.novelty import novelty as novelty
    from restuning.methods import METHODS as METHODS
    from restuning.methods import Bypass as Bypass
    from restuning.methods import BypassAttention as BypassAttention
    from restuning.methods import BypassQuery as BypassQuery
    from restuning.methods import Full as Full
    from restuning.methods import Ladder as Ladder
    from restuning.methods import LinearAll as LinearAll
    from restuning.methods import Mix as Mix
    from restuning.methods import Residual as Residual
    from restuning.methods import SideTuning as SideTuning
    from restuning.methods import on_blocks as on_blocks
    from restuning.methods import resize as resize
    from restuning.model.count import count as count
    from restuning.model.peft import load_peft as load_peft
    from restuning.model.peft import save_peft as save_peft
    from restuning.model.predictor import Predictor as Predictor
    from restuning.model.tuned import Tuned as Tuned
    from restuning.model.tuned import adapt as adapt
    from restuning.runs.estimators import Classifier as Classifier
    from restuning.runs.estimators import Regressor as Regressor
    from restuning.side import AlexNet as AlexNet
    from restuning.side import SmallCnn as SmallCnn
    from restuning.side.base import SideConfig as SideConfig
    from restuning.side.base import SideNetwork as SideNetwork
    from restuning.side.features import FeatureRequest as FeatureRequest
    from restuning.side.features import Features as Features
    from restuning.side.features import TokenSelection as TokenSelection
    from restuning.training.calibrate import Calibration as Calibration
    from restuning.training.calibrate import calibrate as calibrate
    from restuning.tuners import Adapter as Adapter
    from restuning.tuners import Bias as Bias
    from restuning.tuners import Convpass as Convpass
    from restuning.tuners import Dtl as Dtl
    from restuning.tuners import Lora as Lora
    from restuning.tuners import Prefix as Prefix
    from restuning.tuners import PrefixTuning as PrefixTuning
    from restuning.tuners import Prompt as Prompt
    from restuning.tuners import PromptTuning as PromptTuning
    from restuning.tuners import Ssf as Ssf
    from restuning.tuners.base import AttentionTuner as AttentionTuner
    from restuning.tuners.base import Mergeable as Mergeable
    from restuning.tuners.base import PromptTuner as PromptTuner
    from restuning.tuners.base import StatefulTuner as StatefulTuner
    from restuning.tuners.base import Tuner as Tuner

_PUBLIC = {
    "_types": ("Kernel", "SiteInfo"),
    "backbones.anatomy": ("Anatomy", "Op", "Weight", "into", "out_of"),
    "backbones.load": ("load_backbone",),
    "backbones.sites": ("find_sites",),
    "data": ("load_task",),
    "errors": ("RestuningError",),
    "features.novelty": ("Novelty", "novelty"),
    "methods": (
        "METHODS",
        "Bypass",
        "BypassAttention",
        "BypassQuery",
        "Full",
        "Ladder",
        "LinearAll",
        "Mix",
        "Residual",
        "SideTuning",
        "on_blocks",
        "resize",
    ),
    "model.count": ("count",),
    "model.peft": ("load_peft", "save_peft"),
    "model.predictor": ("Predictor",),
    "model.tuned": ("Tuned", "adapt"),
    "runs.estimators": ("Classifier", "Regressor"),
    "side": ("AlexNet", "SmallCnn"),
    "side.base": ("SideConfig", "SideNetwork"),
    "side.features": ("FeatureRequest", "Features", "TokenSelection"),
    "training.calibrate": ("Calibration", "calibrate"),
    "tuners.base": ("AttentionTuner", "Mergeable", "PromptTuner", "StatefulTuner", "Tuner"),
    "tuners": ("Adapter", "Bias", "Convpass", "Dtl", "Lora", "Prefix", "PrefixTuning", "Prompt", "PromptTuning", "Ssf"),
}
"""The public names, by the module that defines them; the imports above say the same to type checkers."""

_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'restuning' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"restuning.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])

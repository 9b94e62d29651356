"""Res-Tuning (NeurIPS 2023, arXiv 2310.19859): tuners unbound from a frozen backbone."""

from typing import TYPE_CHECKING, Any

from restuning._types import Features as Features
from restuning._types import Kernel as Kernel
from restuning._types import Port as Port
from restuning._version import __version__ as __version__
from restuning.adapt import Tuned as Tuned
from restuning.adapt import adapt as adapt
from restuning.errors import RestuningError as RestuningError
from restuning.measure import count as count
from restuning.methods import Bypass as Bypass
from restuning.methods import BypassAttention as BypassAttention
from restuning.methods import BypassQuery as BypassQuery
from restuning.methods import Full as Full
from restuning.methods import Ladder as Ladder
from restuning.methods import LinearAll as LinearAll
from restuning.methods import Mix as Mix
from restuning.methods import Residual as Residual
from restuning.methods import SideTuning as SideTuning
from restuning.methods import methods as methods
from restuning.methods import on_blocks as on_blocks
from restuning.methods import resize as resize
from restuning.peft import load_peft as load_peft
from restuning.peft import save_peft as save_peft
from restuning.side import AlexNet as AlexNet
from restuning.side import SmallCnn as SmallCnn
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
from restuning.wiring.anatomy import Anatomy as Anatomy
from restuning.wiring.anatomy import Op as Op
from restuning.wiring.anatomy import Weight as Weight
from restuning.wiring.anatomy import into as into
from restuning.wiring.anatomy import out_of as out_of
from restuning.wiring.sites import find_sites as find_sites

if TYPE_CHECKING:
    from restuning.backbones import load_backbone as load_backbone
    from restuning.data import load_task as load_task


def __getattr__(name: str) -> Any:
    """What needs more than torch is loaded when used."""
    if name == "load_backbone":
        from restuning.backbones import load_backbone

        return load_backbone
    if name == "load_task":
        from restuning.data import load_task

        return load_task
    raise AttributeError(f"module 'restuning' has no attribute {name!r}")

"""Networks on a frozen backbone's features that feed nothing back: one file each, its settings and the network."""

from restuning.side.attention import BypassAttention as BypassAttention
from restuning.side.bypass import Bypass as Bypass
from restuning.side.ladder import Ladder as Ladder
from restuning.side.query import BypassQuery as BypassQuery
from restuning.side.readout import LinearAll as LinearAll
from restuning.side.side_tuning import AlexNet as AlexNet
from restuning.side.side_tuning import SideTuning as SideTuning
from restuning.side.side_tuning import SmallCnn as SmallCnn

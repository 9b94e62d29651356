"""Networks on a frozen backbone's features that feed nothing back: one file each, its settings and the network."""

from restuning.side.attention import BypassAttention as BypassAttention
from restuning.side.bypass import Bypass as Bypass
from restuning.side.ladder import Ladder as Ladder
from restuning.side.last import Last as Last
from restuning.side.losa import Losa as Losa
from restuning.side.mist import Mist as Mist
from restuning.side.query import BypassQuery as BypassQuery
from restuning.side.readout import LinearAll as LinearAll
from restuning.side.sherl import Sherl as Sherl
from restuning.side.side_tuning import AlexNet as AlexNet
from restuning.side.side_tuning import SideTuning as SideTuning
from restuning.side.side_tuning import SmallCnn as SmallCnn
from restuning.side.unipt import UniPt as UniPt
from restuning.side.vqt import Vqt as Vqt

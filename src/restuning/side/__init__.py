"""What reads a backbone's features and feeds nothing back."""

from restuning.side.bypass import BypassNet as BypassNet
from restuning.side.bypass import keeps_mean as keeps_mean
from restuning.side.bypass import mixes_tokens as mixes_tokens
from restuning.side.ladder import LadderNet as LadderNet
from restuning.side.ladder import prune as prune
from restuning.side.side_tuning import AlexNet as AlexNet
from restuning.side.side_tuning import SideNet as SideNet
from restuning.side.side_tuning import SmallCnn as SmallCnn

"""Table 7 as data: a method says which tuner goes to which operation, or runs beside the backbone."""

from restuning.methods.files import from_dict as from_dict
from restuning.methods.files import to_dict as to_dict
from restuning.methods.named import ABOUT as ABOUT
from restuning.methods.named import FAMILIES as FAMILIES
from restuning.methods.named import METHODS as METHODS
from restuning.methods.named import NOTES as NOTES
from restuning.methods.named import find_method as find_method
from restuning.methods.spec import Full as Full
from restuning.methods.spec import Method as Method
from restuning.methods.spec import Mix as Mix
from restuning.methods.spec import Part as Part
from restuning.methods.spec import Residual as Residual
from restuning.methods.spec import on_blocks as on_blocks
from restuning.methods.spec import resize as resize
from restuning.side import Bypass as Bypass
from restuning.side import BypassAttention as BypassAttention
from restuning.side import BypassQuery as BypassQuery
from restuning.side import Ladder as Ladder
from restuning.side import LinearAll as LinearAll
from restuning.side import SideTuning as SideTuning

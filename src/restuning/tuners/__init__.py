"""What is added: one tuner a file. Independent of backbones."""

from restuning.tuners.adapter import Adapter as Adapter
from restuning.tuners.bias import Bias as Bias
from restuning.tuners.convpass import Convpass as Convpass
from restuning.tuners.dtl import Dtl as Dtl
from restuning.tuners.lora import Lora as Lora
from restuning.tuners.prefix import Prefix as Prefix
from restuning.tuners.prefix_tuning import PrefixTuning as PrefixTuning
from restuning.tuners.prompt import Prompt as Prompt
from restuning.tuners.prompt_tuning import PromptTuning as PromptTuning
from restuning.tuners.ssf import Ssf as Ssf

"""What is added: one tuner a file. A tuner never hears of a backbone."""

from restuning.tuners.adapter import Adapter as Adapter
from restuning.tuners.prefix import Prefix as Prefix
from restuning.tuners.prompt import Prompt as Prompt

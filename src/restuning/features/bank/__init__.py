"""Features kept: in memory for a run, on disk for all."""

from restuning.features.bank.build import build as build
from restuning.features.bank.read import Bank as Bank
from restuning.features.bank.read import FromBank as FromBank
from restuning.features.memory import LIMIT as LIMIT
from restuning.features.memory import FromFeatures as FromFeatures
from restuning.features.memory import Kept as Kept
from restuning.features.memory import bytes_each as bytes_each
from restuning.features.memory import keep as keep

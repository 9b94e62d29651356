"""Features kept: in memory for a run, on disk for all."""

from restuning.bank.kept import LIMIT as LIMIT
from restuning.bank.kept import FromFeatures as FromFeatures
from restuning.bank.kept import Kept as Kept
from restuning.bank.kept import bytes_each as bytes_each
from restuning.bank.kept import keep as keep
from restuning.bank.store import Bank as Bank
from restuning.bank.store import FromBank as FromBank
from restuning.bank.store import build as build

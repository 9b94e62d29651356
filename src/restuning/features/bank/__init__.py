"""Features kept: in memory for a run, on disk for all."""

from restuning.features.bank.build import build as build
from restuning.features.bank.join import append as append
from restuning.features.bank.join import info as info
from restuning.features.bank.join import merge as merge
from restuning.features.bank.read import Bank as Bank
from restuning.features.bank.read import FromBank as FromBank
from restuning.features.memory import LIMIT as LIMIT
from restuning.features.memory import CachedFeatures as CachedFeatures
from restuning.features.memory import FromFeatures as FromFeatures
from restuning.features.memory import bytes_per_item as bytes_per_item
from restuning.features.memory import cache_features as cache_features

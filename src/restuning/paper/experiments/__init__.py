"""The paper's tables and figures as data, one file each; a new experiment is a new entry."""

import difflib
from importlib import import_module

from restuning.errors import RestuningError
from restuning.paper.experiments import small
from restuning.paper.experiments.ours import OWN
from restuning.paper.experiments.spec import COSTS as COSTS
from restuning.paper.experiments.spec import Data as Data
from restuning.paper.experiments.spec import Experiment as Experiment
from restuning.paper.experiments.spec import Row as Row

_PAPER = "intro tab1 tab2a tab2b tab2c tab3a tab3b tab3c tab4 tab5 tab6 fig4 fig5 tab12 tab13 tab14 tab15 tab16 tab17"

EXPERIMENTS: dict[str, Experiment] = {
    e.name: e
    for e in (
        *(import_module(f"restuning.paper.experiments.{file}").EXPERIMENT for file in _PAPER.split()),
        *small.EXPERIMENTS,
    )
}
SUITES: dict[str, tuple[str, ...]] = {"small": tuple(e.name for e in small.EXPERIMENTS)}


def find(name: str) -> list[Experiment]:
    """An experiment, or all of a suite. Raises RestuningError with the nearest names."""
    if name in SUITES:
        return [EXPERIMENTS[n] for n in SUITES[name]]
    if name not in EXPERIMENTS:
        known = (*EXPERIMENTS, *SUITES, *OWN)
        near = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise RestuningError(f"unknown experiment {name!r}{hint}: expected one of {', '.join(known)}")
    return [EXPERIMENTS[name]]

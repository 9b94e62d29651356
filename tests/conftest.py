"""Shapes are types: the annotations of tuners, wiring and side paths are checked while the tests run."""

from jaxtyping import install_import_hook

with install_import_hook(["restuning.tuners", "restuning.side", "restuning.wiring"], "beartype.beartype"):
    import restuning  # noqa: F401

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)

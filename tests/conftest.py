"""Shapes are types: the annotations of tuners, hooks and side networks are checked while the tests run."""

import signal

from jaxtyping import install_import_hook

with install_import_hook(
    [
        f"restuning.{name}"
        for name in (
            "tuners",
            "side",
            "backbones.sites",
            "hooks.law",
            "hooks.points",
            "hooks.prompts",
            "hooks.taps",
            "hooks.tail",
        )
    ],
    "beartype.beartype",
):
    import restuning  # noqa: F401

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# a shell that starts the tests in the background has Ctrl-C ignored, and every process below it inherits that
signal.signal(signal.SIGINT, signal.default_int_handler)

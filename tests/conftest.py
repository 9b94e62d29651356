"""Shapes are types: the annotations of tuners, hooks and side networks are checked while the tests run."""

import signal
from importlib.util import find_spec

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


collect_ignore = [] if find_spec("torchao") else ["test_quantised.py"]  # it needs restuning[quantised]

# a shell that starts the tests in the background has Ctrl-C ignored, and every process below it inherits that
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`pytest -m fast`: the laws on a transformer, a convolutional backbone, a text encoder and one of a user's own."""
    for item in items:
        if item.path.name == "test_laws.py" and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            name = item.callspec.id
            if name in ("timm-vit", "timm-resnet", "bert", "own") or (
                name.startswith(("timm-vit-", "timm-resnet-", "bert-", "own-"))
                and not name.startswith(("timm-vit-mean", "timm-vit-layerscale"))
                and name.split("-", 2)[-1].split("-")[-1] in ("adapter", "bypass", "lora", "linear", "ssf")
            ):
                item.add_marker(pytest.mark.fast)

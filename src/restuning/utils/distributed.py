"""One run in several processes, as `accelerate launch` and `torchrun` start them: the first one writes."""

import os

import torch

from restuning.errors import MissingExtra, RestuningError


def together() -> bool:
    return world_size() > 1


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this one is."""
    return int(os.environ.get("RANK", "0")) if together() else 0


def is_main_process() -> bool:
    return rank() == 0


def barrier() -> int:
    """Wait until all processes are here; how many. At the first call each takes its device."""
    if not together():
        return 1
    try:
        from accelerate import PartialState
        from accelerate.utils import parse_flag_from_env
    except ImportError as error:
        raise MissingExtra("accelerate", "train") from error
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available())
    state.wait_for_everyone()
    count, wanted = int(state.num_processes), int(os.environ["WORLD_SIZE"])
    if count != wanted:
        raise RestuningError(f"{count} of {wanted} processes found one another: start them with accelerate launch")
    return count

"""Which of several processes this one is, and its device."""

import atexit
import os
from functools import cache

import torch


def rank() -> int:
    """This process among those that share the work, as torchrun numbers them."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes that share the work."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def best_device() -> torch.device:
    """This process's GPU (torchrun says which), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@cache
def leave_at_exit() -> None:
    """Let this process leave its process group before the interpreter ends.

    Lightning does so for nccl only. Threads of gloo that are still there abort a rank which ends before the first one,
    after all its work is done.
    """
    atexit.register(_leave)


def _leave() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

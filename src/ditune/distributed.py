"""Which of several processes this one is, and its device."""

import atexit
import os
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """This process among those that share the work, as its process group numbers them, or else torchrun."""
    return dist.get_rank() if in_group() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes that share the work."""
    return dist.get_world_size() if in_group() else int(os.environ.get("WORLD_SIZE", "1"))


def in_group() -> bool:
    """Whether this process belongs to a process group, as the ranks of a training do."""
    return dist.is_available() and dist.is_initialized()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of all ranks' values, in place; those of this process where it is in no process group."""
    if in_group():
        dist.all_reduce(values)
    return values


@torch.no_grad()
def take_first_ranks_weights(network: nn.Module) -> None:
    """Give all ranks the first one's weights, so that what they compute together is of one network to the bit."""
    if in_group():
        for value in network.state_dict().values():
            dist.broadcast(value, 0)


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
    if in_group():
        dist.destroy_process_group()

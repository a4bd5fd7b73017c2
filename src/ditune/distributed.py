"""Which of several processes this one is, its device, and its share of tensors that are spread over all of them."""

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


def is_spread(value: Tensor | nn.Module) -> bool:
    """Whether a tensor, or a network's parameters, are spread over the processes (DTensors, by `trainer=fsdp`)."""
    tensor = value if isinstance(value, Tensor) else next(value.parameters())
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a spread tensor, in the same memory; another tensor itself."""
    return tensor.to_local() if is_spread(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows of a spread tensor, for which all processes call it; another tensor itself."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def spread_like(value: Tensor, other: Tensor) -> Tensor:
    """A tensor that all processes have, spread as `other` is, over the same memory; itself where `other` is not."""
    if not is_spread(other) or is_spread(value):
        return value
    from torch.distributed.tensor import DTensor  # takes time to import

    mesh, value = other.device_mesh, value.contiguous()
    shares = value.chunk(mesh.size())  # along dimension 0, as fully_shard does
    own = mesh.get_local_rank()
    share = (shares[own] if own < len(shares) else value[:0]).to(other.device)
    arguments = {"run_check": False, "shape": value.shape, "stride": value.stride()}
    return DTensor.from_local(share, mesh, other.placements, **arguments)


def snapshot(tensor: Tensor) -> Tensor:
    """A copy on the CPU. Of a spread tensor it is the tensor itself, which is written before it changes again."""
    return tensor.detach() if is_spread(tensor) else tensor.detach().cpu().clone()


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

"""Which of several processes this one is, and its device."""

import os

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

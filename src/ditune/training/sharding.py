"""A network that is spread over the processes, for trainings that fill more than one device (`trainer=fsdp`).

torch's FSDP2 cuts every parameter along its first dimension, and with it gradient, optimizer state and EMA. A block's
parameters are whole for as long as it computes.
"""

from collections.abc import Mapping
from copy import deepcopy
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy, ParallelStrategy
from torch import nn
from torch.optim import Optimizer

from ditune.distributed import whole
from ditune.errors import UserError
from ditune.training.callbacks.compare_ranks import compare

if TYPE_CHECKING:
    from ditune.training.module import GenerativeModule


class Sharded(ModelParallelStrategy):
    """Lightning's strategy around `fully_shard`, with one dimension: every process has a share of everything.

    Args:
        timeout: without an answer of another process after which one ends.
    """

    def __init__(self, timeout: timedelta):
        super().__init__(timeout=timeout)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def spread(self, module: "GenerativeModule") -> None:
        """Spread the network, which all processes have built alike, over them: block by block, then the rest.

        Args:
            module: of the training; its network's parameters become DTensors.

        Raises:
            RankError: the processes have other networks.
            UserError: a parameter has no dimension to cut.
        """
        from torch.distributed.fsdp import fully_shard  # takes seconds to import

        network = module.network
        compare(module.trainer, dict(network.named_parameters()))
        scalar = next((name for name, p in network.named_parameters() if not p.ndim), None)
        if scalar is not None:
            raise UserError(f"trainer=fsdp cuts parameters, and {scalar} is a single number. Set trainer=ddp.")
        self.skeleton = skeleton(network)
        for part in (*network.blocks, network):
            fully_shard(part, mesh=self.device_mesh["data_parallel"], reshard_after_forward=True)
            part.unshard()  # once outside of inference mode: what is made in it cannot be trained later
            part.reshard()

    @torch.no_grad()
    def put_together(self, module: "GenerativeModule", everywhere: bool) -> nn.Module:
        """The plain network of what is spread, after the training; all processes call it.

        Args:
            module: of the training; the state of its optimizer is given up, to make room.
            everywhere: whether every process gets it, on its device; else the first one alone does, on the CPU.

        Returns:
            The network; in other processes one without values.
        """
        for optimizer in self.optimizers:
            optimizer.state.clear()
        kept = everywhere or self.is_global_zero
        device = self.root_device if everywhere else torch.device("cpu")
        values = {}
        for name, value in module.network.state_dict().items():
            full = whole(value.detach())
            if kept:
                values[name] = full.to(device, copy=full is value)
        if kept:
            self.skeleton.load_state_dict(values, assign=True)
        return self.skeleton.to(device) if kept else self.skeleton

    # Lightning's own forms gather all, or execute pickles when they are read

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module says itself what is saved."""
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return ParallelStrategy.optimizer_state(self, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        ParallelStrategy.load_optimizer_state_dict(self, checkpoint)


def skeleton(network: nn.Module) -> nn.Module:
    """A copy of a network whose parameters take no memory; its method is the same object."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in network.parameters()
    }
    method = getattr(network, "adaptation", None)
    if method is not None:
        memo[id(method)] = method
    return deepcopy(network, memo)

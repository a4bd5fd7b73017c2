"""The pretrained network inside of an adapted one: what trains has its first values, and no prompts are added."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ditune.peft.vpt import Prepend, Prompted, Strip


class Off:
    """The base of an adapted network, without a second copy of what is frozen. Gradients do not reach it.

    Args:
        network: with a method applied, and before anything of it has been trained. Of full fine-tuning, everything
            trains, so everything is copied.
    """

    def __init__(self, network: nn.Module):
        self.network, self.num_classes = network, network.num_classes
        self.first = {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}
        self.prompted = [m for m in network.modules() if isinstance(m, Prompted | Prepend | Strip)]

    @torch.no_grad()
    def __call__(self, *inputs: Tensor, **more: Tensor) -> Tensor:
        """The base's output, see `DiT.forward`."""
        device = next(self.network.parameters()).device
        self.first = {name: value.to(device) for name, value in self.first.items()}  # once, after the network
        with self._without_prompts():
            return torch.func.functional_call(self.network, self.first, inputs, more)

    @contextmanager
    def _without_prompts(self) -> Iterator[None]:
        for module in self.prompted:
            module.off = True
        try:
            yield
        finally:
            for module in self.prompted:
                module.off = False

"""A frozen network of any shape, read as a flow, for objectives that distil it."""

import torch
from torch import Tensor, nn

from ditune.processes import FlowProcess


class Teacher:
    """A trained network that gives targets. It is in no checkpoint, and no gradient reaches it.

    Args:
        network: DiT or DiT-MoE of any depth and width; it is frozen.
        process: of the network, read as a flow on the straight path.
        sha256: of its file, by which a run knows its teacher.
    """

    def __init__(self, network: nn.Module, process: FlowProcess, sha256: str):
        self.network, self.process, self.sha256 = network.eval().requires_grad_(False), process, sha256
        self.num_classes = network.num_classes

    @torch.no_grad()
    def __call__(self, x: Tensor, *inputs: Tensor) -> Tensor:
        """The network's output at x (N, C, H, W), see `DiT.forward`; it moves to the device of x once."""
        if next(self.network.parameters()).device != x.device:
            self.network.to(x.device)
        return self.network(x, *inputs)

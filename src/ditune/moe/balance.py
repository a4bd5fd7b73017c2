"""Keeping the load of a mixture's experts even: losses that are added to the objective's, and biases of the routers."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditune.errors import UserError
from ditune.networks import DiTMoE
from ditune.networks.routing import Routing, balance_loss, z_loss

SCOPES = ("batch", "sequence", "global")


class Watched:
    """A network whose routers' decisions, and labels, are kept of the last call that was differentiated."""

    def __init__(self, network: DiTMoE):
        self.network, self.num_classes = network, network.num_classes
        self.routing: list[Routing] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, *step: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.network(x, t, y, *step)
        self.routing, self.y = [], y
        return self.network(x, t, y, *step, routing=self.routing)


class Balance:
    """What keeps the load even. Losses are summed over the layers and added to the loss like any other part of it.

    Args:
        scope: what the balance loss is computed of. 'batch': the micro-batch of one process, as DiT-MoE does (arXiv
            2407.11633, eq. 7). 'sequence': each image, as its paper writes it. 'global': the load is that of the whole
            batch over all processes and the step's micro-batches so far (arXiv 2501.11873).
        alpha: weight of the balance loss; 0 = none.
        z: weight of the z-loss on the routers' logits (arXiv 2202.08906).
        bias_rate: by which an expert's bias in the choice moves after every step, up where its load of the global
            batch is below the mean, else down (loss-free balance, arXiv 2408.15664; 0.001 there). 0 = biases rest.

    Raises:
        UserError: an unknown scope, or a negative number.
    """

    def __init__(self, scope: str = "batch", alpha: float = 0.01, z: float = 0.0, bias_rate: float = 0.0):
        if scope not in SCOPES:
            raise UserError(f"There is no balance of scope {scope!r}. Choose one of {', '.join(SCOPES)}.")
        if min(alpha, z, bias_rate) < 0:
            raise UserError("A weight of the balance is negative. Set balance.alpha, z and bias_rate to 0 or more.")
        self.scope, self.alpha, self.z, self.bias_rate = scope, alpha, z, bias_rate
        self.step = -1
        self.counts_LE = torch.zeros(0)  # tokens of each layer's experts, in the step's micro-batches so far

    def loss(self, routing: list[Routing], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """What is added to the loss of a micro-batch, and its parts for the log.

        Args:
            routing: of every layer.
            step: optimizer step that the micro-batch belongs to.
        """
        counts_LE = torch.stack([layer.chosen_NTE.sum(dim=(0, 1)) for layer in routing])
        if self.scope == "global":
            counts_LE = over_processes(counts_LE)
        self.counts_LE = counts_LE + (self.counts_LE if step == self.step else 0)
        self.step = step
        wide = self.counts_LE if self.scope == "global" else [None] * len(routing)
        balance = torch.stack(
            [
                balance_loss(layer, counts_E, self.scope == "sequence")
                for layer, counts_E in zip(routing, wide, strict=True)
            ]
        )
        z = torch.stack([z_loss(layer) for layer in routing])
        total = self.alpha * balance.sum() + self.z * z.sum()
        return total, {"balance": balance.mean().detach(), "z": z.mean().detach(), "routing_loss": total.detach()}

    @torch.no_grad()
    def update(self, network: DiTMoE) -> None:
        """Move the biases by the load of the step that is being made."""
        if not self.bias_rate:
            return
        counts_LE = self.counts_LE if self.scope == "global" else over_processes(self.counts_LE)
        load_LE = counts_LE.float()
        change_LE = self.bias_rate * (load_LE.mean(dim=1, keepdim=True) - load_LE).sign()
        change_LE -= change_LE.mean(dim=1, keepdim=True)  # the same for all experts would change nothing
        for layer, change_E in zip(network.moe_layers.values(), change_LE, strict=True):
            layer.router.bias_E += change_E

    @staticmethod
    def state_dict(network: nn.Module) -> dict[str, Tensor]:
        """The biases, which are no parameters."""
        return {name: b.detach().cpu().clone() for name, b in network.named_buffers() if name.endswith("bias_E")}

    @staticmethod
    @torch.no_grad()
    def load_state_dict(network: nn.Module, state: dict[str, Tensor]) -> None:
        buffers = dict(network.named_buffers())
        for name, value in state.items():
            buffers[name].copy_(value)


def over_processes(counts: Tensor) -> Tensor:
    """Sum over all processes."""
    if dist.is_available() and dist.is_initialized():
        counts = counts.clone()
        dist.all_reduce(counts)
    return counts

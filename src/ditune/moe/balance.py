"""Load balance of experts: losses that are added to the objective's, and biases of the routers."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditune.errors import require
from ditune.networks import DiTMoE
from ditune.networks.routing import Routing, balance_loss, z_loss

SCOPES = ("batch", "sequence", "global")


class Watched:
    """A network that records routing and labels of its last call with gradients.

    Args:
        network: the network.

    Attributes:
        routing: of every layer with experts, in order.
        y: (N,) labels of that call.
    """

    def __init__(self, network: DiTMoE):
        self.network, self.num_classes, self.patch_size = network, network.num_classes, network.patch_size
        self.routing: list[Routing] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor, *step: Tensor, **more: Tensor) -> Tensor:
        """See `DiTMoE.forward`; calls without gradients are not recorded."""
        if not torch.is_grad_enabled():
            return self.network(x, t, y, *step, **more)
        self.routing, self.y = [], y
        return self.network(x, t, y, *step, **more, routing=self.routing)


class Balance:
    """Balance loss and z-loss, summed over the layers, and the bias update of loss-free balance.

    Args:
        scope: samples of the balance loss. 'batch': the micro-batch of one process, as in DiT-MoE's code (arXiv
            2407.11633, eq. 7). 'sequence': each image by itself, as in its paper. 'global': the load is that of the
            whole batch, over all processes and the step's micro-batches so far (arXiv 2501.11873).
        alpha: weight of the balance loss; 0 = none.
        z: weight of the z-loss on the routers' logits (arXiv 2202.08906, eq. 5); 0 = none.
        bias_rate: step size of the routers' biases (loss-free balance, arXiv 2408.15664, which uses 0.001). After every
            optimizer step the bias of an expert rises if its load in the global batch is below the mean, else it falls.
            0 = biases are constant.

    Raises:
        UserError: an unknown scope, or a negative number.
    """

    def __init__(self, scope: str = "batch", alpha: float = 0.01, z: float = 0.0, bias_rate: float = 0.0):
        require(scope in SCOPES, "balance.scope", scope, f"Choose one of {', '.join(SCOPES)}.")
        require(alpha >= 0, "balance.alpha", alpha, "Set it to 0 or more.")
        require(z >= 0, "balance.z", z, "Set it to 0 or more.")
        require(bias_rate >= 0, "balance.bias_rate", bias_rate, "Set it to 0 or more.")
        self.scope, self.alpha, self.z, self.bias_rate = scope, alpha, z, bias_rate
        self.step = -1
        self.counts_LE = torch.zeros(0)  # tokens of each layer's experts, in the step's micro-batches so far

    def loss(self, routing: list[Routing], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The term that is added to the loss of a micro-batch.

        Args:
            routing: of every layer with experts, in order.
            step: optimizer step of the micro-batch, from 0.

        Returns:
            The scalar term, and its parts for the log, detached.
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
    def update(self, network: DiTMoE, skipped: Tensor | None = None) -> None:
        """Update the routers' biases by the load of the current step (arXiv 2408.15664).

        Args:
            network: its buffers `bias_E` change.
            skipped: scalar; where it is 1, they stay as they are.
        """
        if not self.bias_rate:
            return
        counts_LE = self.counts_LE if self.scope == "global" else over_processes(self.counts_LE)
        load_LE = counts_LE.float()
        change_LE = self.bias_rate * (load_LE.mean(dim=1, keepdim=True) - load_LE).sign()
        change_LE -= change_LE.mean(dim=1, keepdim=True)  # a common shift would change no choice
        if skipped is not None:
            change_LE *= 1 - skipped
        for layer, change_E in zip(network.moe_layers.values(), change_LE, strict=True):
            layer.router.bias_E += change_E

    @property
    def of_micro_batches(self) -> bool:
        """Whether the loss depends on how the global batch is divided into micro-batches."""
        return self.alpha != 0 and self.scope != "sequence"

    @staticmethod
    def state_dict(network: nn.Module) -> dict[str, Tensor]:
        """Copies of the routers' biases, which are buffers, on the CPU."""
        return {name: b.detach().cpu().clone() for name, b in network.named_buffers() if name.endswith("bias_E")}

    @staticmethod
    @torch.no_grad()
    def load_state_dict(network: nn.Module, state: dict[str, Tensor]) -> None:
        """Restore the result of `state_dict`."""
        buffers = dict(network.named_buffers())
        for name, value in state.items():
            buffers[name].copy_(value)


def over_processes(counts: Tensor) -> Tensor:
    """Sum of a tensor over all processes."""
    if dist.is_available() and dist.is_initialized():
        counts = counts.clone()
        dist.all_reduce(counts)
    return counts

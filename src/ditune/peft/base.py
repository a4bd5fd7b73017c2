"""The seam between a network and the methods that adapt it: a predicate over parameters plus injected ones."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ditune.errors import UserError

LABELS = "y_embedder."  # the label table, in every network


class PeftMethod(ABC):
    """One way to adapt a pretrained network.

    Args:
        lr: recommended learning rate; `optimizer.lr` takes it from the config unless an experiment sets another.
        weight_decay: recommended weight decay.
        train_labels: the label table trains too, as every row of DiffFit's tables does.
    """

    unmergeable: str | None = None  # why the method cannot become a plain network, where it cannot

    def __init__(self, lr: float, weight_decay: float = 0.0, train_labels: bool = True):
        self.lr, self.weight_decay, self.train_labels = lr, weight_decay, train_labels

    @abstractmethod
    def selects(self, name: str) -> bool:
        """Whether the parameter called `name` trains."""

    def inject(self, network: nn.Module) -> None:  # noqa: B027, most methods inject nothing
        """Add the method's own parameters; the network's output must not change by it."""

    def fold(self, network: nn.Module) -> None:  # noqa: B027, and so have nothing to fold
        """Fold injected parameters into the network's own and remove them."""

    def apply(self, network: nn.Module) -> None:
        """Inject, then freeze all that the method does not select.

        Raises:
            UserError: the method does not fit the network, or trains nothing of it.
        """
        self.inject(network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(self.selects(name) or (self.train_labels and name.startswith(LABELS)))
        if not self.trainable(network):
            raise UserError(f"{type(self).__name__} trains no parameter of this network. Choose another method.")

    def trainable(self, network: nn.Module) -> dict[str, nn.Parameter]:
        return {name: p for name, p in network.named_parameters() if p.requires_grad}

    def state_dict(self, network: nn.Module) -> dict[str, Tensor]:
        """What the method trained, and nothing else: copies on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.trainable(network).items()}

    @torch.no_grad()
    def load_state_dict(self, network: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Copy tensors of `state_dict` into an applied network; nothing is copied unless all of them fit.

        Raises:
            UserError: names or shapes differ.
        """
        own = self.trainable(network)
        missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        shapes = [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
        if missing or unknown or shapes:
            what = "; ".join(
                f"{text} {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
                for text, names in (("missing", missing), ("unknown", unknown), ("of another shape", sorted(shapes)))
                if names
            )
            raise UserError(
                f"The adapter does not fit this network and method: {what}. "
                "Load it with the network, the number of classes and the method that it was trained with."
            )
        for name, parameter in own.items():
            parameter.copy_(tensors[name])

    @torch.no_grad()
    def merge(self, network: nn.Module) -> None:
        """Turn an adapted network into a plain one with the same output, in fp32.

        Raises:
            UserError: the method cannot be merged; the network is as it was.
        """
        if self.unmergeable:
            raise UserError(
                f"{type(self).__name__} cannot be merged into a plain network: {self.unmergeable}. "
                "Keep the adapter beside its base network."
            )
        network.float()
        self.fold(network)
        network.requires_grad_(True)


def mlp_name(block: nn.Module) -> str:
    """What a block calls its second branch: `mlp` in DiT, `moe` in DiT-MoE."""
    return "mlp" if hasattr(block, "mlp") else "moe"

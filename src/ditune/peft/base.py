"""The seam between a network and the methods that adapt it: a predicate over parameters plus injected ones."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ditune.errors import UserError
from ditune.peft.slots import all_or_nothing

LABELS = "y_embedder"  # the label table's module, in every network


class PeftMethod(ABC):
    """One way to adapt a pretrained network.

    Args:
        lr: recommended learning rate; `optimizer.lr` takes it from the config unless an experiment sets another.
        weight_decay: recommended weight decay.
        train_labels: the label table trains too, as every row of DiffFit's tables does.
    """

    forward_mode = True  # the adapted network can be differentiated by torch.func.jvp
    unmergeable: str | None = None  # why the method cannot become a plain network, where it cannot

    def __init__(self, lr: float, weight_decay: float = 0.0, train_labels: bool = True):
        self.lr, self.weight_decay, self.train_labels = lr, weight_decay, train_labels
        self.arguments: dict[str, Any] = {}  # name and keyword arguments that `build_peft` has made the method of

    @property
    def title(self) -> str:
        """The method's name in messages and tables."""
        return self.arguments.get("name", type(self).__name__)

    @abstractmethod
    def selects(self, name: str) -> bool:
        """Whether the parameter called `name` trains."""

    def inject(self, network: nn.Module) -> None:  # noqa: B027, some methods inject nothing
        """Add the method's own parameters; the network's output must not change by it."""

    def fold(self, network: nn.Module) -> None:  # noqa: B027, and so have nothing to fold
        """Fold injected parameters into the network's own and remove them."""

    def apply(self, network: nn.Module) -> None:
        """Inject, then freeze all that the method does not select.

        Raises:
            UserError: the method does not fit the network or trains nothing of it; the network is as it was.
        """
        if getattr(network, "adaptation", None) is not None:
            raise UserError("The network is adapted already. Merge it first, or load the base network again.")
        with all_or_nothing(network):
            self.inject(network)
            names = [name for name, _ in network.named_parameters()]
            chosen = {
                n for n in names if self.selects(n) or self._is_label(n) or n.startswith(network.new_parameter_prefixes)
            }
            if not chosen:
                raise UserError(f"{self.title} trains no parameter of this network. Choose another method.")
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in chosen)
        network.train(network.training)  # the injected modules too
        network.adaptation = self

    def _is_label(self, name: str) -> bool:
        return self.train_labels and name.startswith(f"{LABELS}.")

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
                f"{self.title} cannot be merged into a plain network: {self.unmergeable}. "
                "Keep the adapter beside its base network."
            )
        network.float()
        self.fold(network)
        network.requires_grad_(True)
        network.adaptation = None

    # For methods that do something in training, or have a file format of their own

    def penalty(self, network: nn.Module) -> Tensor | float:
        """What the method adds to the loss of every micro-batch."""
        return 0.0

    def after_step(self, network: nn.Module, step: int) -> None:  # noqa: B027, most methods do nothing
        """Called after every update of the parameters, their gradients still there; the first `step` is 1."""

    def training_state(self) -> dict[str, Any]:
        """What a resumed training needs besides the parameters: tensors and plain values."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:  # noqa: B027, as above
        """Take over what `training_state` gave."""

    def to_file(self, network: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Content of the adapter's file: a JSON config that says how to build the method, and tensors."""
        return {"peft": self.arguments}, self.state_dict(network)

    def from_file(self, network: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Load the tensors of `to_file` into a network that the method has been applied to."""
        self.load_state_dict(network, tensors)


def on_tokens(output: Tensor | tuple[Tensor, ...], change: Callable[[Tensor], Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Change the tokens that a module gives; DiT-MoE's give their routing beside them."""
    return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])


def mlp_name(block: nn.Module) -> str:
    """What a block calls its second branch: `mlp` in DiT, `moe` in DiT-MoE."""
    return "mlp" if hasattr(block, "mlp") else "moe"

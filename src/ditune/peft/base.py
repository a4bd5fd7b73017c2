"""The interface of PEFT methods: a predicate over parameters plus injected modules and parameters."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ditune.distributed import snapshot, spread_like
from ditune.errors import UserError
from ditune.peft.dial import Dial
from ditune.peft.slots import Slots, all_or_nothing, separate

LABELS = "y_embedder"  # name of the label table's module in every network


class PeftMethod(ABC):
    """A method that adapts a pretrained network. A subclass implements `selects`, and usually `inject` and `fold`.

    Args:
        lr: recommended learning rate, the default of `optimizer.lr`.
        weight_decay: recommended weight decay.
        train_labels: the label table trains too, as in the DiffFit paper's tables.
    """

    forward_mode = True  # the adapted network can be differentiated by torch.func.jvp
    whole_weights = False  # it computes with frozen weights or changes them, and does not call their layers alone
    starts_as_identity = True  # the adapted network first has the output of the base
    unmergeable: str | None = None  # why an adapted network cannot become a plain one; None = it can
    # parts of the names of injected parameters that move along the dial, see `dial`; None = there is no path
    path: tuple[str, ...] | None = ()
    no_path = "what it adds is not zero anywhere"  # the reason, where `path` is None
    # how adapters are added up: their parameters, the ranks of their factors, or None = they cannot be
    sums: Literal["parameters", "ranks"] | None = None

    def __init__(self, lr: float, weight_decay: float = 0.0, train_labels: bool = True):
        self.lr, self.weight_decay, self.train_labels = lr, weight_decay, train_labels
        self.arguments: dict[str, Any] = {}  # name and keyword arguments of `build_peft`
        self.dial: Dial | None = None  # between the base and the adapter, where `apply` keeps the base

    @property
    def title(self) -> str:
        """The method's name in messages and tables."""
        return self.arguments.get("name", type(self).__name__)

    @abstractmethod
    def selects(self, name: str) -> bool:
        """Whether the parameter of this full name trains; `apply` adds labels and new parameters by itself."""

    def inject(self, network: nn.Module) -> None:  # noqa: B027, some methods inject nothing
        """Add the method's own parameters and modules.

        The network's output must not change, unless `starts_as_identity` is False.

        Args:
            network: changed in place.

        Raises:
            UserError: the method does not fit the network.
        """

    def fold(self, network: nn.Module) -> None:  # noqa: B027, and so have nothing to fold
        """Fold the injected parameters into the network's own, then remove them.

        Args:
            network: changed in place; its output stays.
        """

    def moves(self, name: str) -> bool:
        """Whether the injected parameter of this full name moves along the dial."""
        return any(part in f"{name}." for part in self.path or ())

    def bind(self, part: Callable[[Tensor], Tensor]) -> None:  # noqa: B027, most methods do not know the time
        """Learn what the network's time means, before `apply`.

        Args:
            part: from the network's time (N,) to the part of the process, 0 = data, 1 = noise.
        """

    def apply(self, network: nn.Module, base: Slots | None = None, new_classes: bool = False) -> None:
        """Adapt a network: inject, then freeze every parameter that the method does not select.

        Args:
            network: changed in place.
            base: `slots(network)` of the base, which is kept with them: what trains is copied, `self.dial` leads back.
                None = the base's values are overwritten.
            new_classes: whether the label table is of other classes than the base's.

        Raises:
            UserError: the method does not fit the network or trains nothing of it; the network is as it was.
        """
        if getattr(network, "adaptation", None) is not None:
            raise UserError("The network is adapted already. Merge it first, or load the base network again.")
        if base is not None:
            self.check_base_stays()
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
        if base is not None:
            separate(base)
            self.dial = Dial(network, self, base, new_classes)

    def check_base_stays(self) -> None:  # noqa: B027, most methods leave its frozen weights alone
        """Refuse to keep the base where the method changes weights that do not train.

        Raises:
            UserError: it does.
        """

    def _is_label(self, name: str) -> bool:
        return self.train_labels and name.startswith(f"{LABELS}.")

    def trainable(self, network: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: p for name, p in network.named_parameters() if p.requires_grad}

    def state_dict(self, network: nn.Module) -> dict[str, Tensor]:
        """Copies of the trained parameters, on the CPU, by name; see `snapshot` where they are spread."""
        return {name: snapshot(p) for name, p in self.trainable(network).items()}

    @torch.no_grad()
    def load_state_dict(self, network: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Copy tensors of `state_dict` into an adapted network; none is copied unless all fit.

        Args:
            network: adapted by this method.
            tensors: by the names of `trainable`.

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
            parameter.copy_(spread_like(tensors[name], parameter))

    @torch.no_grad()
    def merge(self, network: nn.Module) -> None:
        """Turn an adapted network into a plain one with the same output, in fp32.

        Args:
            network: changed in place.

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
        network.adaptation = self.dial = None

    # For methods that do something in training, or have a file format of their own

    def penalty(self, network: nn.Module) -> Tensor | float:
        """A term that is added to the loss of every micro-batch: scalar, 0 by default."""
        return 0.0

    def after_step(self, network: nn.Module, step: int) -> None:  # noqa: B027, most methods do nothing
        """Called after every update of the parameters, before their gradients are cleared.

        Args:
            network: adapted by this method.
            step: number of updates so far, from 1.
        """

    def training_state(self) -> dict[str, Any]:
        """Tensors and plain values that a resumed training needs besides the parameters."""
        return {}

    def load_training_state(self, state: dict[str, Any]) -> None:  # noqa: B027, as above
        """Restore the result of `training_state`."""

    def to_file(self, network: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Content of an adapter's files: a config in plain JSON values, by which the method is built, and tensors."""
        return {"peft": self.arguments}, self.state_dict(network)

    def from_file(self, network: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Load the tensors of `to_file` into an adapted network.

        Raises:
            UserError: they do not fit.
        """
        self.load_state_dict(network, tensors)


def on_tokens(output: Tensor | tuple[Tensor, ...], change: Callable[[Tensor], Tensor]) -> Tensor | tuple[Tensor, ...]:
    """Apply a function to the tokens of a module's output.

    Args:
        output: tokens (N, T, D), or (tokens, routing) of modules with experts.
        change: function of the tokens.
    """
    return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])


def mlp_name(block: nn.Module) -> str:
    """Name of a block's second branch: `mlp`, or `moe` with experts."""
    return "mlp" if hasattr(block, "mlp") else "moe"

"""The dial of an adapted network: theta(lambda) = theta_0 + lambda (theta - theta_0), from the base to the adapter.

At 0 the adapter is taken out of the network's slots, at 1 nothing is changed: both are exact for every method. Between
them, what trained is interpolated (torch.lerp). Random factors such as LoRA's A stay, so that the change of the weights
is what grows by lambda: of every product one factor moves, that which begins at zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ditune.errors import UserError
from ditune.peft.slots import Slots, difference, fill, undo

if TYPE_CHECKING:
    from ditune.peft.base import PeftMethod

TABLE = "embedding_table.weight"  # of the labels; an adapter may have other classes than its base


@dataclass(frozen=True)
class Position:
    """A place of the dial.

    Args:
        strength: lambda.
        filled: slots and what stands in them there; the base and the adapter need none.
    """

    strength: float
    filled: Slots = field(default_factory=dict)


class Dial:
    """An adapted network between its base (0) and its adapter (1); `PeftMethod.apply` makes one where it is asked to.

    Args:
        network: adapted. Its parameters that the base has too are copies.
        method: its method.
        base: the slots of the network before it was adapted, see `ditune.peft.slots`.
        new_classes: whether the label table is of other classes than the base's.
    """

    def __init__(self, network: nn.Module, method: PeftMethod, base: Slots, new_classes: bool = False):
        self.network, self.method, self.base, self.new_classes = network, method, base, new_classes
        self.change = difference(network, base)
        # injected parameters begin as the base does nothing: gammas at 1, LoRA's B at 0
        self.start = {
            name: value.detach().clone()
            for name, value in method.trainable(network).items()
            if base.get(self._slot(name)) is None and method.moves(name)
        }
        self.now = Position(1.0)
        self.masked: tuple[str, ...] = ()  # trained parameters whose zeros are a pattern that a strength must keep
        self._adapters: Slots = {}  # what stands in the slots of `now` at 1

    @property
    def strength(self) -> float:
        """lambda as it is now."""
        return self.now.strength

    def set(self, strength: float) -> None:
        """Turn the dial; the adapter's own values are kept.

        Args:
            strength: lambda; 0 = the base, 1 = the adapter. Values outside of 0..1 extrapolate.

        Raises:
            UserError: the method has no path between the base and the adapter, or zeros of `masked` would be filled.
        """
        self._enter(self._sparse(self.position(strength)))

    @contextmanager
    def turned(self, strength: float) -> Iterator[nn.Module]:
        """Turn the dial inside of the block, then back; yields the network. See `set`."""
        with self._held(self._sparse(self.position(strength))):
            yield self.network

    def _sparse(self, position: Position) -> Position:
        """The position, refused if it fills zeros of `masked`; the base (0) is none of the adapter's networks."""
        with self._held(Position(1.0)):
            values = self.method.trainable(self.network)
            filled = [
                name
                for name in self.masked
                if name in values and self._slot(name) in position.filled
                if (position.filled[self._slot(name)] == 0).sum() < (values[name] == 0).sum()
            ]
        if filled:
            raise UserError(
                f"strength is {position.strength:g}, and the adapter was trained with zeros (sparsity=) that weights "
                f"between it and its base do not have, such as in {filled[0]}. Set it to 0 (the base) or 1 (the "
                "adapter), or merge dense runs."
            )
        return position

    def at(self, strength: float) -> Turned:
        """The network at a strength as a function, while it stays as it is between the calls. See `set`."""
        return Turned(self, self.position(strength))

    def position(self, strength: float) -> Position:
        """The place of a strength, by the values that the adapter has now. See `set`."""
        self._follow()
        if strength in (0, 1):
            return Position(float(strength))
        if self.method.path is None:
            raise UserError(
                f"strength is {strength:g}, and {self.method.title} has no path between base and adapter: "
                f"{self.method.no_path}. Set it to 0 (the base) or 1 (the adapter)."
            )
        with self._held(Position(1.0)):
            filled = {}
            for name, value in self.method.trainable(self.network).items():
                start = self.start_of(name, value)
                if start is not None:
                    between = torch.lerp(start.to(value), value.detach(), strength)
                    filled[self._slot(name)] = nn.Parameter(between, requires_grad=value.requires_grad)
        return Position(float(strength), filled)

    def start_of(self, name: str, value: Tensor) -> Tensor | None:
        """theta_0 of a trained parameter; None = it does not move."""
        start = self._base_table() if name.endswith(TABLE) else self.base.get(self._slot(name))
        if start is None:  # also where the base has an empty place, as norms without weights
            return self.start.get(name)
        if name.endswith(TABLE) and self._has_other_classes(start, value):
            # rows of classes that the base does not know have no other end; the null class is the last row
            return torch.cat([value.detach()[:-1], start[-1:].to(value)]) if self._has_null_class() else None
        if name.startswith(self.network.new_parameter_prefixes) and start.any():
            return None  # random, like LoRA's A; the layer behind it begins at zero
        return start

    def _base_table(self) -> Tensor:
        """The base's label table, whose module may have been replaced too."""
        table = self.base[self.network.y_embedder, "_modules", "embedding_table"]
        return self.base[table, "_parameters", "weight"]

    def _has_other_classes(self, start: Tensor, value: Tensor) -> bool:
        return self.new_classes or start.shape != value.shape

    def _has_null_class(self) -> bool:
        return self.network.config["class_dropout_prob"] > 0

    def _slot(self, name: str) -> tuple[nn.Module, str, str]:
        path, _, leaf = name.rpartition(".")
        return self.network.get_submodule(path), "_parameters", leaf

    def _follow(self) -> None:
        """Bring the base's own parameters to the device of the network, which has moved without them."""
        device = next(self.network.parameters()).device
        for slot in self.change:
            value = self.base.get(slot)
            if isinstance(value, nn.Parameter) and value.device != device:
                value.data = value.data.to(device)
            elif isinstance(value, nn.Module):
                value.to(device)

    @contextmanager
    def _held(self, position: Position) -> Iterator[None]:
        before = self.now
        self._enter(position)
        try:
            yield
        finally:
            self._enter(before)

    def _enter(self, position: Position) -> None:
        if position is self.now:
            return
        if self.now.strength == 0:
            fill(self.change)
        else:
            fill({slot: self._adapters[slot] for slot in self.now.filled})
        self.now = position
        if position.strength == 0:
            undo(self.change, self.base)
            return
        self._adapters = {(m, kind, name): getattr(m, kind)[name] for m, kind, name in position.filled}
        fill(position.filled)


class Turned:
    """The network at a place of its dial, as a function.

    Args:
        dial: of the network.
        position: the place.
    """

    def __init__(self, dial: Dial, position: Position):
        self.dial, self.position = dial, position
        with dial._held(position):
            self.num_classes = dial.network.num_classes

    def __call__(self, *inputs: Tensor, **more: Tensor) -> Tensor:
        """The network's output there."""
        with self.dial._held(self.position):
            return self.dial.network(*inputs, **more)

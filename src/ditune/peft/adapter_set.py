"""Several adapters of one base network, switched between calls or merged by weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn

from ditune.errors import UserError
from ditune.peft.base import PeftMethod
from ditune.peft.label_table import resize_labels
from ditune.peft.slots import Slots, difference, fill, slots, undo


class Adapters:
    """Adapters of one network, of any methods, for sampling. The base's own weights do not change.

    Args:
        network: the base, not adapted. Its output and `num_classes` follow the adapter in use.

    Example: `with adapters.used("watercolour"): network(x, t, y)`
    """

    def __init__(self, network: nn.Module):
        self.network = network.requires_grad_(False)
        self.base = slots(network)
        self.changes: dict[str, Slots] = {}
        self.name: str | None = None

    def add(self, name: str, method: PeftMethod, tensors: dict[str, Tensor], num_classes: int | None = None) -> None:
        """Add an adapter; the adapter in use stays in use.

        Args:
            name: name of the adapter.
            method: its method, not applied yet.
            tensors: its tensors, as from `PeftMethod.to_file`.
            num_classes: its number of classes; None = the base's.

        Raises:
            UserError: the name is taken, or the adapter does not fit; the network is as it was.
        """
        if name in self.changes:
            raise UserError(f"There is an adapter {name!r} already. Give it another name.")
        before = self.name
        self.use(None)
        try:
            if num_classes not in (None, self.network.num_classes):
                resize_labels(self.network, num_classes)
            method.apply(self.network, base=self.base)
            method.from_file(self.network, tensors)
            self.network.requires_grad_(False)
            self.changes[name] = difference(self.network, self.base)
        finally:
            undo(difference(self.network, self.base), self.base)
            self.network.requires_grad_(False)
            self.use(before)

    def use(self, name: str | None) -> None:
        """Use an adapter from now on.

        Args:
            name: name of the adapter; None = the base alone.

        Raises:
            UserError: there is no adapter of that name.
        """
        if name is not None and name not in self.changes:
            raise UserError(f"There is no adapter {name!r}. Choose of {', '.join(self.changes) or 'none: add one'}.")
        if self.name is not None:
            undo(self.changes[self.name], self.base)
        if name is not None:
            self._follow(self.changes[name])
            fill(self.changes[name])
            self.network.train(self.network.training)
        self.name = name

    def _follow(self, change: Slots) -> None:
        """Bring an adapter to the network's device, which has moved without the adapters that are not in use."""
        device = next(self.network.parameters()).device
        for slot, value in change.items():
            if isinstance(value, nn.Module):
                value.to(device)
            elif isinstance(value, nn.Parameter) and value.device != device:
                change[slot] = nn.Parameter(value.detach().to(device), requires_grad=value.requires_grad)

    @contextmanager
    def used(self, name: str | None) -> Iterator[nn.Module]:
        """Use an adapter inside of the block, then the previous one again; yields the network."""
        before = self.name
        self.use(name)
        try:
            yield self.network
        finally:
            self.use(before)


@torch.no_grad()
def merge_adapters(adapters: Adapters, weights: Mapping[str, float]) -> nn.Module:
    """One plain network of several adapters, theta_0 + sum_k w_k (theta_k - theta_0) (as DeMe, arXiv 2410.06664).

    It is computed as (1 - sum_k w_k) theta_0 + sum_k w_k theta_k: one weight of 1 gives that adapter's network to the
    bit, and no weight the base.

    Args:
        adapters: of one base.
        weights: w_k by the adapter's name, any numbers; adapters that are left out have 0.

    Raises:
        UserError: there is no adapter of a name, or its method cannot be merged, or it has other classes.
    """
    with adapters.used(None) as base:
        merged = deepcopy(base)
    values = {name: (1 - sum(weights.values())) * value for name, value in merged.named_parameters()}
    for name, weight in weights.items():
        with adapters.used(name) as adapted:
            own = deepcopy(adapted)
        if own.num_classes != merged.num_classes:
            raise UserError(f"The adapter {name!r} has other classes than the base, so their tables cannot be added.")
        own.adaptation.merge(own)
        for key, value in own.named_parameters():
            values[key] = values[key] + weight * value
    for key, parameter in merged.named_parameters():
        parameter.copy_(values[key])
    return merged

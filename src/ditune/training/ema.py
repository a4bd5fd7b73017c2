"""Exponential moving average of what trains, and of nothing else: what is frozen is its own average."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ditune.distributed import is_spread, local, snapshot, spread_like


class Ema:
    """EMA of named parameters in fp32.

    Args:
        parameters: name to parameter; the average starts as a copy.
        decay: weight of the old average. It grows from 1/10 as (1 + step) / (10 + step), steps from 0, up to this
            value, so that the average of a short run does not lag behind.
        unread: the parameters have no values yet, and the average has shapes only.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float, unread: bool = False):
        self.decay, self.parameters = decay, parameters
        values = {name: p.detach() for name, p in parameters.items()}
        self.average = {name: torch.empty_like(v, device="meta") if unread else v.clone() for name, v in values.items()}
        self._weight: Tensor | None = None  # of the largest parameter's size, for weights that the device alone knows

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor | None = None) -> None:
        """Go on by one step.

        Args:
            step: optimizer step, from 0.
            skipped: scalar on the parameters' device; where it is 1, the average stays as it is.
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        self.follow()
        averages, values = ([local(v.detach()) for v in of.values()] for of in (self.average, self.parameters))
        if skipped is None:
            torch._foreach_lerp_(averages, values, weight)
            return
        # a weight that the device alone knows must have each tensor's shape, or every tensor takes a kernel of its own
        if self._weight is None or self._weight.device != skipped.device:
            self._weight = torch.empty(max(map(Tensor.numel, values)), device=skipped.device)
        self._weight.copy_(weight * (1 - skipped))
        weights = [self._weight[: value.numel()].view(value.shape) for value in values]
        torch._foreach_lerp_(averages, values, weights)

    def follow(self) -> None:
        """Move to the network's device; once, when the trainer has moved the network as a whole."""
        first = next(iter(self.parameters))
        if self.average[first].device != self.parameters[first].device:
            self.average = {name: self.average[name].to(p.device) for name, p in self.parameters.items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The network computes with the average inside of the block."""
        with self.exchanged(self.parameters, self.average):
            yield

    @staticmethod
    @contextmanager
    def exchanged(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> Iterator[None]:
        """Named parameters have other values inside of the block."""
        before = {name: p.detach().clone() for name, p in parameters.items()}
        _copy(values, parameters)
        try:
            yield
        finally:
            _copy(before, parameters)

    def state_dict(self) -> dict[str, Tensor]:
        return {name: snapshot(value) for name, value in self.average.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in self.average.items():
            value.copy_(spread_like(state[name], value))


@torch.no_grad()
def _copy(values: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def with_weights(network: nn.Module, weights: dict[str, Tensor]) -> Callable[..., Tensor]:
    """The network's function with other weights (of what trains); the network itself stays as it is.

    Where they are spread over the processes, the network has them during the call, and no gradient reaches them.
    """
    if not is_spread(network):
        return lambda *inputs: torch.func.functional_call(network, weights, inputs)

    @torch.no_grad()
    def call(*inputs: Tensor) -> Tensor:
        with Ema.exchanged({name: network.get_parameter(name) for name in weights}, weights):
            return network(*inputs)

    return call

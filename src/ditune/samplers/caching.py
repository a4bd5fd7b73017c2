"""Reuse of block outputs between the network calls of one generation, after DeepCache (arXiv 2312.00858).

DeepCache is made for U-Nets. A DiT has no shallow path around its deep layers, so what is kept here are outputs of
blocks. A full call computes and keeps them; the other calls take them from what was kept. Embeddings, adaLN and the
final layer are computed in every call.

k numbers the network calls from 0, S is their number. Which calls are full depends on k and S alone, so image i is the
same whatever its batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from math import factorial, prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditune.errors import UserError, require
from ditune.networks.block import TransformerBlock

Compute = Callable[..., Any]


class Generation:
    """The network calls of one generation, and what its full calls have kept.

    Args:
        cache: which calls are full.
        calls: S.
    """

    def __init__(self, cache: "Cache", calls: int):
        self.cache, self.calls = cache, calls
        self.call, self.full = -1, True  # k, and whether everything is computed in it
        self.kept: dict[Hashable, Any] = {}
        self.inputs: object = None  # what must not change between two calls that share outputs

    def begin(self, inputs: object) -> None:
        """Begin the next call. Guidance that begins or ends changes the batch, which makes a call full.

        Args:
            inputs: shape and dtype of the batch.
        """
        self.call += 1
        changed = inputs != self.inputs
        if changed:
            self.kept.clear()
        self.inputs = inputs
        self.full = changed or self.cache.is_full(self.call, self.calls)


class Cache(ABC):
    """Base class of the policies. It holds settings only; every generation has a `Generation` of its own.

    Args:
        interval: N, calls from one full call to the next, at least 1; 1 = plain sampling, to the bit.

    Raises:
        UserError: the interval is below 1.
    """

    kind: ClassVar[str]  # name in stored evaluation protocols
    parameters: ClassVar[tuple[str, ...]]  # attributes that change the images

    def __init__(self, interval: int):
        require(interval >= 1, "cache.interval", interval, "Set it to 1 or more.")
        self.interval = interval

    @property
    def settings(self) -> dict[str, Any]:
        """Names and values of `parameters`, a part of every stored evaluation protocol."""
        return {name: getattr(self, name) for name in self.parameters}

    @abstractmethod
    def is_full(self, call: int, calls: int) -> bool:
        """Whether call k = `call` of S = `calls` computes everything."""

    @abstractmethod
    def replaced(self, network: nn.Module, generation: Generation) -> Iterator[tuple[nn.Module, str, Compute]]:
        """(module, name of its method, what runs instead) for all methods whose outputs are reused."""

    @contextmanager
    def used(self, network: nn.Module, calls: int) -> Iterator[Callable[..., Tensor]]:
        """The network with reuse, for one generation.

        Args:
            network: a DiT, adapted or not.
            calls: S, number of network calls.
        """
        generation = Generation(self, calls)
        replaced = list(self.replaced(network, generation))
        for owner, name, run in replaced:
            setattr(owner, name, torch.compiler.disable(run, recursive=False))

        def call(x: Tensor, *conditions: Tensor, **more: Tensor) -> Tensor:
            generation.begin((x.shape, x.dtype))
            return network(x, *conditions, **more)

        try:
            yield call
        finally:
            for owner, name, _ in replaced:
                delattr(owner, name)  # the class's own method is there again


class Branches(Cache):
    """Policies that keep each block's attention and MLP, before the gates: the gates are always the current ones."""

    def replaced(self, network: nn.Module, generation: Generation) -> Iterator[tuple[nn.Module, str, Compute]]:
        """The two branches of every block, see `Cache.replaced`."""
        for i, block in enumerate(module for module in network.modules() if isinstance(module, TransformerBlock)):
            for name in ("attend", "transform"):
                yield block, name, self._reused((i, name), getattr(block, name), generation)

    def _reused(self, key: Hashable, compute: Compute, generation: Generation) -> Compute:
        def run(*inputs: Tensor) -> Any:
            entry = generation.kept.get(key)
            if not generation.full:
                tokens, routing = self.forecast(entry[0], generation.call), entry[1]
                return (tokens, *routing) if routing else tokens
            output = compute(*inputs)
            tokens, *routing = output if isinstance(output, tuple) else (output,)  # with experts: their routing too
            generation.kept[key] = self.keep(entry and entry[0], tokens, generation.call), routing
            return output

        return run

    @abstractmethod
    def keep(self, entry: Any, tokens: Tensor, call: int) -> Any:
        """What is kept of a branch's output (N, T, D) in a full call; `entry` is what was kept before, or None."""

    @abstractmethod
    def forecast(self, entry: Any, call: int) -> Tensor:
        """The output (N, T, D) that a reusing call takes."""


class Fora(Branches):
    """The outputs of the last full call as they are (FORA, arXiv 2407.01425).

    Call k is full if k = 0 or N divides S - 1 - k, so that the last call always is.
    """

    kind = "FORA"
    parameters = ("interval",)

    def is_full(self, call: int, calls: int) -> bool:
        """See `Cache.is_full`."""
        return call == 0 or (calls - 1 - call) % self.interval == 0

    def keep(self, entry: Any, tokens: Tensor, call: int) -> Tensor:
        """The output itself."""
        return tokens

    def forecast(self, entry: Tensor, call: int) -> Tensor:
        """The output itself."""
        return entry


class Taylor(Branches):
    """Outputs extrapolated over the calls from differences of full calls (TaylorSeer).

    Call k is full if k < F, or if N divides k - F + 1.

    Args:
        interval: N, see `Cache`.
        order: differences that are kept, at least 0; 0 = reuse as it is.
        form: 'taylor' sums differences over distances as if they were derivatives, which is exact for outputs that are
            linear in k; 'newton' interpolates, which is exact up to the order.
        first: F, full calls at the beginning, at least 1.

    Raises:
        UserError: a value out of range.
    """

    kind = "Taylor"
    parameters = ("interval", "order", "form", "first")

    def __init__(self, interval: int, order: int = 1, form: str = "newton", first: int = 2):
        super().__init__(interval)
        require(order >= 0, "cache.order", order, "Set it to 0 or more.")
        require(form in ("taylor", "newton"), "cache.form", form, "Choose taylor or newton.")
        require(first >= 1, "cache.first", first, "Set it to 1 or more.")
        self.order, self.form, self.first = order, form, first

    def is_full(self, call: int, calls: int) -> bool:
        """See `Cache.is_full`."""
        return call < self.first or (call - self.first + 1) % self.interval == 0

    def keep(self, entry: Any, tokens: Tensor, call: int) -> tuple[list[int], list[Tensor]]:
        """The full calls k_0 (this one), k_1, ..., and one factor for each order.

        Differences are kept in fp32: those of bf16 values have few bits left.
        """
        calls, factors = [call], [tokens]
        if entry is not None:
            calls += entry[0][: self.order]
            for j, previous in enumerate(entry[1][: self.order]):
                distance = call - entry[0][j if self.form == "newton" else 0]
                factors.append((factors[j] - previous).to(torch.promote_types(tokens.dtype, torch.float32)) / distance)
        return calls, factors

    def forecast(self, entry: tuple[list[int], list[Tensor]], call: int) -> Tensor:
        """sum_j F_j (k - k_0)^j / j!, or Newton's sum_j F_j prod_{l<j} (k - k_l)."""
        calls, (tokens, *factors) = entry
        result = tokens
        for j, factor in enumerate(factors, start=1):
            if self.form == "taylor":
                result = result + factor * ((call - calls[0]) ** j / factorial(j))
            else:
                result = result + factor * prod(call - full for full in calls[:j])
        return result.to(tokens.dtype)


class Delta(Cache):
    """What a range of blocks adds to its input is kept; the current input still counts (Delta-DiT, arXiv 2406.01125).

    The rear blocks are skipped in the early calls, which decide the outline, and the front blocks in the late ones.
    No code of the paper is public: the sizes of the ranges and the calendar are ours.

    Args:
        interval: N; call k is full if N divides k, or if it is the last one.
        blocks: share of the blocks that a range has, in (0, 1].
        switch: share of the calls in which the rear blocks are skipped, in [0, 1].

    Raises:
        UserError: a value out of range; or, in use, the blocks of a range change the number of tokens.
    """

    kind = "Delta"
    parameters = ("interval", "blocks", "switch")

    def __init__(self, interval: int, blocks: float = 0.5, switch: float = 0.5):
        super().__init__(interval)
        require(0 < blocks <= 1, "cache.blocks", blocks, "Set it above 0 and at most to 1.")
        require(0 <= switch <= 1, "cache.switch", switch, "Set it between 0 and 1.")
        self.blocks, self.switch = blocks, switch

    def is_full(self, call: int, calls: int) -> bool:
        """See `Cache.is_full`."""
        return call % self.interval == 0 or call == calls - 1

    def replaced(self, network: nn.Module, generation: Generation) -> Iterator[tuple[nn.Module, str, Compute]]:
        """The blocks that belong to a range, see `Cache.replaced`."""
        depth = len(network.blocks)
        size = max(1, round(self.blocks * depth))
        ranges = {"front": range(size), "rear": range(depth - size, depth)}
        for i, block in enumerate(network.blocks):
            if any(i in blocks for blocks in ranges.values()):
                yield block, "forward", self._reused(i, block.forward, ranges, generation)

    def _reused(self, i: int, compute: Compute, ranges: dict[str, range], generation: Generation) -> Compute:
        def run(x: Tensor, *inputs: Tensor) -> Any:
            kept = generation.kept
            skipped = "rear" if generation.call < self.switch * generation.calls else "front"
            if not generation.full and i in ranges[skipped]:
                tokens, routing = x, kept["routing", i]
                if i == ranges[skipped][0]:
                    tokens = x + kept["delta", skipped]
                return (tokens, *routing) if routing else tokens
            output = compute(x, *inputs)
            if generation.full:
                tokens, *kept["routing", i] = output if isinstance(output, tuple) else (output,)
                for name, blocks in ranges.items():
                    if i == blocks[0]:
                        kept["input", name] = x
                    if i == blocks[-1]:
                        kept["delta", name] = _difference(tokens, kept.pop(("input", name)))
            return output

        return run


def _difference(after: Tensor, before: Tensor) -> Tensor:
    if after.shape != before.shape:
        raise UserError(
            "cache=delta skips whole blocks, and blocks of this network change the number of tokens "
            "(peft=vpt_shallow). Choose cache=fora or cache=taylor."
        )
    return after - before

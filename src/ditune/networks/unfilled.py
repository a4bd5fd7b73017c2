"""Networks whose parameters have shapes and no memory, for weights that come from a file.

An ordinary constructor allocates every parameter and fills it with random numbers, which a file's weights then
replace. Here nothing is filled. What the constructor would have done is written down, so that parameters which the
file lacks can still get the numbers that an ordinary constructor would have given them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

from ditune.networks.unread import Memory, Place, Unread, own_rows, unread_of


class Initialisation(TorchDispatchMode):
    """Writes down every change of a parameter without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[tuple[Any, Tensor, tuple, dict]] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in the block, and skipping would import the compiler: seconds and 160 MB

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Called for every operation in the block."""
        in_place = func._schema.name.endswith("_")
        if in_place and isinstance(args[0], Tensor) and args[0].is_meta:
            self.changes.append((func, args[0], args[1:], kwargs or {}))
            return args[0]  # there is nothing to change; torch would import its compiler to find that out
        return func(*args, **(kwargs or {}))

    @torch.no_grad()
    def values(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The initial values of some parameters, with the random numbers of an ordinary constructor.

        The numbers of all others are made and dropped, one parameter at a time. Torch's global generator must be as it
        was before the constructor; it is left as an ordinary constructor would leave it.

        Args:
            parameters: of the network that was built in the block, by name.

        Returns:
            Their values on the CPU.
        """
        wanted = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in parameters.items()}
        by_storage = {_storage(p): wanted[name] for name, p in parameters.items()}
        for _ in self.repeat(by_storage):
            pass
        return wanted

    def repeat(self, by_storage: Mapping[int, Tensor]) -> Iterator[int]:
        """Do the changes to tensors that have memory; of all others only the random numbers are made.

        Args:
            by_storage: tensors by the storages of those in the block, see `_storage`.

        Yields:
            The storage of each one that has been changed.
        """
        for func, tensor, args, kwargs in self.changes:
            whole = by_storage.get(_storage(tensor))
            if whole is not None:
                func(whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()), *args, **kwargs)
                yield _storage(tensor)
            elif torch.Tag.nondeterministic_seeded in func.tags:
                func(torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype), *args, **kwargs)


@contextmanager
def unfilled() -> Iterator[Initialisation]:
    """Give parameters that are made inside of the block no memory; buffers are computed as ever.

    Yields:
        What the constructors inside of the block did to their parameters.
    """

    def without_memory(_: nn.Module, __: str, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.is_meta:
            return parameter  # it has two places, and stays one
        return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(without_memory)
    try:
        with Initialisation() as initialisation:
            yield initialisation
    finally:
        hook.remove()


class Uninitialised(Unread):
    """Parameters of a new network that have not been initialised yet; all are filled at once, in one row of numbers.

    Torch's global generator must be as it was before the constructor.

    Args:
        network: built in `unfilled`; its parameters get memory.
        initialisation: what its constructor did.
    """

    def __init__(self, network: nn.Module, initialisation: Initialisation) -> None:
        super().__init__()
        self.generator = torch.get_rng_state()  # later the state behind the last number
        self._initialisation, self._storages = initialisation, {}
        memory = {}
        for name, parameter in network.named_parameters():
            memory[name], self._storages[name] = self.add(name, parameter.shape), _storage(parameter)
        network.load_state_dict(memory, strict=False, assign=True)  # buffers have their values
        network.unread = self

    def as_bf16(self, tensor: Tensor) -> Tensor:
        """In bf16, of the numbers of fp32."""
        self.fill([tensor])
        return super().as_bf16(tensor)

    def _fill(self, found: list[tuple[Memory, str]], place: Place) -> None:
        memories = {self._storages[name]: memory for memory, name in (*found, *self._waiting.values())}
        rows = {storage: own_rows(len(memory.tensor), place) for storage, memory in memories.items()}
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.generator)
            for storage in self._initialisation.repeat({key: memory.tensor for key, memory in memories.items()}):
                memories[storage].keep(rows[storage])
            self.generator = torch.get_rng_state()
        self._waiting.clear()
        self._initialisation.changes.clear()


def skeleton(network: nn.Module) -> nn.Module:
    """A copy of a network whose parameters take no memory; its method is the same object."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in network.parameters()
    }
    method = getattr(network, "adaptation", None)
    if method is not None:
        memo[id(method)] = method
    if unread_of(network) is not None:
        memo[id(network.unread)] = None
    return deepcopy(network, memo)


def _storage(tensor: Tensor) -> int:
    """A number that a tensor shares with its views only."""
    return tensor.untyped_storage()._cdata

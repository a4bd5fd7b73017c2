"""Networks whose parameters have shapes and no memory, for weights that come from a file.

An ordinary constructor allocates every parameter and fills it with random numbers, which a file's weights then
replace. Here nothing is filled. What the constructor would have done is written down, so that parameters which the
file lacks can still get the numbers that an ordinary constructor would have given them.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode


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
        for func, tensor, args, kwargs in self.changes:
            whole = by_storage.get(_storage(tensor))
            if whole is not None:
                func(whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()), *args, **kwargs)
            elif torch.Tag.nondeterministic_seeded in func.tags:
                func(torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype), *args, **kwargs)
        return wanted


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


def _storage(tensor: Tensor) -> int:
    """A number that a tensor shares with its views only."""
    return tensor.untyped_storage()._cdata

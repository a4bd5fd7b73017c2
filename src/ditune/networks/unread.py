"""Parameters that get their values late: for a network that is spread over processes, each of which reads its rows.

Their memory has addresses from the beginning and no pages, which the system gives where something is written. So the
network is an ordinary one on the CPU, to which methods are applied as ever, and takes no memory before it is filled.
"""

import math
import mmap
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PAGES = 1 << 20  # bytes from which a tensor has pages of its own
Place = tuple[int, int]  # number of a process, and of all processes
WHOLE: Place = (0, 1)


def own_rows(rows: int, place: Place) -> slice:
    """The rows of a tensor that a process keeps, as torch.chunk and so `fully_shard` cut it."""
    number, count = place
    size = -(-rows // count)
    return slice(min(number * size, rows), min((number + 1) * size, rows))


class Memory:
    """Memory of one tensor, which goes back to the system with it.

    The C library keeps memory that it has handed out in pieces of up to 32 MB, and frozen weights go soon: they are
    converted to bf16, cut, or moved to a GPU.

    Args:
        shape: of the tensor.
        dtype: fp32 or bf16.

    Attributes:
        tensor: whose values nobody has written yet.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype = torch.float32):
        size = dtype.itemsize * math.prod(shape)
        self._pages: mmap.mmap | None = None
        if size < PAGES:
            self.tensor = torch.empty(shape, dtype=dtype)
            return
        self._pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.tensor = torch.frombuffer(self._pages, dtype=dtype).view(shape)

    def keep(self, rows: slice) -> None:
        """Give the pages of all other rows back."""
        if self._pages is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        row = self.tensor.nbytes // len(self.tensor)
        before = rows.start * row // mmap.PAGESIZE * mmap.PAGESIZE
        behind = -(-rows.stop * row // mmap.PAGESIZE) * mmap.PAGESIZE
        for start, stop in ((0, before), (behind, self.tensor.nbytes)):
            if start < stop:
                self._pages.madvise(mmap.MADV_DONTNEED, start, stop - start)


class Unread(ABC):
    """The parameters of a network that have no values yet. A subclass knows where the values come from."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[Memory, str]] = {}

    def add(self, name: str, shape: torch.Size) -> Tensor:
        """Memory of a parameter, in fp32; `name` is by what its values are found."""
        memory = Memory(shape)
        self._waiting[address(memory.tensor)] = (memory, name)
        return memory.tensor

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor, or what it is a view of, has no values yet."""
        return address(tensor) in self._waiting

    def as_bf16(self, tensor: Tensor) -> Tensor:
        """The tensor's values in bf16, if it has any; else memory that will hold them."""
        if not self.holds(tensor):
            return tensor.bfloat16()
        _, name = self._waiting.pop(address(tensor))
        memory = Memory(tensor.shape, torch.bfloat16)
        self._waiting[address(memory.tensor)] = (memory, name)
        return memory.tensor

    @torch.no_grad()
    def fill(self, tensors: Iterable[Tensor], place: Place = WHOLE) -> None:
        """Give tensors their values, as far as they have none yet.

        Args:
            tensors: parameters, or views of them.
            place: the process whose rows are read. The other rows stay without values, so the tensor must be cut.

        Raises:
            UserError: the values cannot be read.
        """
        found = [self._waiting.pop(address(t)) for t in {address(t): t for t in tensors if self.holds(t)}.values()]
        if found:
            self._fill(found, place)

    @abstractmethod
    def _fill(self, found: list[tuple[Memory, str]], place: Place) -> None:
        """Fill the process's rows of these parameters."""


class ReadWhole(TorchDispatchMode):
    """Whatever is computed with in the block gets its values before, whole: some methods begin with the base's weights.

    Args:
        unread: of the network; None = all of it has values.
    """

    def __init__(self, unread: Unread | None) -> None:
        super().__init__()
        self.unread = unread

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `Initialisation`

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Called for every operation in the block."""
        kwargs = kwargs or {}
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if self.unread is not None and not is_view:
            self.unread.fill(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return func(*args, **kwargs)


def unread_of(network: nn.Module) -> Unread | None:
    """What of a network has no values yet; None = all of it has."""
    return getattr(network, "unread", None)


def address(tensor: Tensor) -> int:
    """Where the memory of a tensor begins, which its views share; 0 = it has none."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0

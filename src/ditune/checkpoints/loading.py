"""Networks from what a file holds, in the memory of one network.

The network is made without memory, and every tensor of the file is copied into memory of its own, in fp32, one by one.
Mapped pages that have been copied count as memory of the process until their file is closed, so a large file is opened
anew after each of `WINDOWS` parts. Nothing of the file is needed once the network is there: it may be replaced, cut or
deleted while the network trains, where weights that stay mapped would end the process. Processes of one machine share
the pages of the file itself, which belong to the system.
"""

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from ditune.checkpoints.content_hash import KEY, ContentHash
from ditune.checkpoints.source import Composed, Content, Source
from ditune.errors import UserError
from ditune.files.atomic import LARGE
from ditune.networks.dit import INPUTS
from ditune.networks.unfilled import unfilled
from ditune.networks.unread import Memory, Place, Unread, own_rows
from ditune.progress import is_first_rank, meter

log = logging.getLogger(__name__)

WINDOWS = 20  # parts of a large file; it takes a tenth of a second to open one of DiT-XL/2
LONGEST = 1 << 30  # bytes of a part, at most
BLOCKS = "blocks."  # beginning of the names of nearly all weights
SKIPPED = 5  # names of objects that are listed


class InFile(Unread):
    """Parameters whose values are in a file, which is opened anew for each part of the network.

    Args:
        source: the file.
        opened: what a source of this file holds.
        content: what it holds now; kept where it is in memory anyway.
        names: of the parameters; buffers are read at once.
    """

    def __init__(
        self, source: Source, opened: Callable[[Source], Content], content: Content, names: Iterable[str]
    ) -> None:
        super().__init__()
        self._source, self._opened, self.names = source, opened, set(names)
        self._content = None if source.is_mapped else content

    def _fill(self, found: list[tuple[Memory, str]], place: Place) -> None:
        content = self._content or _anew(self._source, self._opened)
        for memory, name in found:
            rows = own_rows(len(memory.tensor), place)
            memory.tensor[rows].copy_(_numbers(name, content.tensors[name][rows], self._source))


def build(
    source: Source, opened: Callable[[Source], Content], overrides: dict[str, Any], later: bool = False
) -> nn.Module:
    """The network of a file, with its weights in fp32.

    Parameters that the file lacks get the random numbers that an ordinary constructor gives them, from torch's global
    generator; without such parameters no random number is made.

    Args:
        source: the file.
        opened: what a source of this file holds.
        overrides: constructor arguments that replace those of the file.
        later: the blocks' weights are not read yet. The network's `unread` fills them, until when the file must stay.

    Raises:
        UserError: the file does not fit the network or the overrides, or changed while it was read.
    """
    content = opened(source)
    if source.strangers:
        names = ", ".join(sorted(source.strangers)[:SKIPPED])
        log.warning("%s also holds objects of %s; they were passed over, nothing was executed", source.path, names)
    added: tuple[str, ...] = ()
    with unfilled() as initialisation:
        try:
            network = content.build(**(content.config | overrides))
        except (TypeError, ValueError) as error:
            raise UserError(f"{source.path} makes no network: {error}. Check the overrides {overrides}.") from error
        network.add_inputs(name for name in INPUTS if overrides.get(name) and not content.config.get(name))
        added = network.new_parameter_prefixes
    try:
        names = (name for name, _ in network.named_parameters() if name.startswith(BLOCKS))
        unread = InFile(source, opened, content, names) if later else None
        tensors = _copied(source, content, opened, unread)
        if added:
            lacking = {name: p for name, p in network.named_parameters() if name.startswith(added)}
            tensors |= initialisation.values(lacking)
        network.load_state_dict(tensors, assign=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{source.path} does not fit the network: {error}. Check the overrides {overrides}.") from error
    network.file, network.unread = source.path, unread
    return network


def _copied(
    source: Source, content: Content, opened: Callable[[Source], Content], unread: InFile | None
) -> dict[str, Tensor]:
    """The tensors of a file in memory of their own, in fp32; with `unread`, those of the blocks are left to it.

    The first of several processes alone checks what the others do not read.
    """
    size = sum(4 * math.prod(value.shape) for value in content.tensors.values())
    in_windows = size > LARGE and source.is_mapped
    copies: dict[str, Tensor] = {}
    facts, found = content.facts, ContentHash(content.facts)
    hashed = bool(facts) and (unread is None or is_first_rank())
    with meter(f"reading {source.path.name}", size, "bytes") if size > LARGE else nullcontext() as progress:
        left = 0
        for name in list(content.tensors):
            if in_windows and left <= 0:
                content, left = _anew(source, opened), min(size // WINDOWS, LONGEST)
            value, waits = content.tensors[name], unread is not None and name in unread.names
            if waits:
                copies[name] = unread.add(name, value.shape)
            if hashed or not waits:
                copy = _copy(name, value, source)
                if hashed:
                    found.add(name, copy)  # our own files hold fp32, so the copy has the bytes of the file
                left -= copy.nbytes
                if not waits:
                    copies[name] = copy
            if progress is not None:
                progress.advance(copies[name].nbytes)
    if hashed and found.hexdigest() != facts[KEY]:
        raise UserError(
            f"{source.path} is damaged: its content has another hash than the one that was written with it. Copy it "
            "again, or make it again (`python src/export.py run=<its run> format=dit`)."
        )
    return copies


def _anew(source: Source, opened: Callable[[Source], Content]) -> Content:
    """The same file, mapped into memory of which nothing has been read yet."""
    other = Source(source.path)
    content = opened(other)
    if other.state != source.state:
        raise UserError(f"{source.path} changed while it was read. Start again when its copy or download has ended.")
    return content


def _copy(name: str, value: Tensor | Composed, source: Source) -> Tensor:
    tensor = value.make() if isinstance(value, Composed) else value
    return Memory(tensor.shape).tensor.copy_(_numbers(name, tensor, source))


def _numbers(name: str, tensor: Tensor, source: Source) -> Tensor:
    if not tensor.is_floating_point():
        raise UserError(f"{source.path} holds whole numbers as {name}. Give the file before its quantisation.")
    return tensor

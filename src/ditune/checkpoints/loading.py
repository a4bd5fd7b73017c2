"""Networks from what a file holds, in the memory of one network.

The network is made without memory, and every tensor of the file is copied into memory of its own, in fp32, one by one.
Mapped pages that have been copied count as memory of the process until their file is closed, so a large file is opened
anew after each of `WINDOWS` parts. Nothing of the file is needed once the network is there: it may be replaced, cut or
deleted while the network trains, where weights that stay mapped would end the process. Processes of one machine share
the pages of the file itself, which belong to the system.
"""

import logging
import math
import mmap
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ditune.checkpoints.content_hash import KEY, ContentHash
from ditune.checkpoints.source import Composed, Content, Source
from ditune.errors import UserError
from ditune.files.atomic import LARGE
from ditune.networks.dit import INPUTS
from ditune.networks.unfilled import unfilled
from ditune.progress import meter

log = logging.getLogger(__name__)

WINDOWS = 20  # parts of a large file; it takes a tenth of a second to open one of DiT-XL/2
PAGES = 1 << 20  # bytes from which a tensor has pages of its own
SKIPPED = 5  # names of objects that are listed


def build(source: Source, opened: Callable[[Source], Content], overrides: dict[str, Any]) -> nn.Module:
    """The network of a file, with its weights in fp32.

    Parameters that the file lacks get the random numbers that an ordinary constructor gives them, from torch's global
    generator; without such parameters no random number is made.

    Args:
        source: the file.
        opened: what a source of this file holds.
        overrides: constructor arguments that replace those of the file.

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
        tensors = _copied(source, content, opened)
        if added:
            lacking = {name: p for name, p in network.named_parameters() if name.startswith(added)}
            tensors |= initialisation.values(lacking)
        network.load_state_dict(tensors, assign=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{source.path} does not fit the network: {error}. Check the overrides {overrides}.") from error
    network.file = source.path
    return network


def _copied(source: Source, content: Content, opened: Callable[[Source], Content]) -> dict[str, Tensor]:
    """The tensors of a file in memory of their own, in fp32."""
    size = sum(4 * math.prod(value.shape) for value in content.tensors.values())
    in_windows = size > LARGE and source.is_mapped
    copies: dict[str, Tensor] = {}
    facts, found = content.facts, ContentHash(content.facts)
    with meter(f"reading {source.path.name}", size, "bytes") if size > LARGE else nullcontext() as progress:
        left = 0
        for name in list(content.tensors):
            if in_windows and left <= 0:
                content, left = _anew(source, opened), size // WINDOWS
            copies[name] = _copy(name, content.tensors[name], source)
            if facts:
                found.add(name, copies[name])  # our own files hold fp32, so the copy has the bytes of the file
            left -= copies[name].nbytes
            if progress is not None:
                progress.advance(copies[name].nbytes)
    if facts and found.hexdigest() != facts[KEY]:
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
    if not tensor.is_floating_point():
        raise UserError(f"{source.path} holds whole numbers as {name}. Give the file before its quantisation.")
    return _memory(tensor.shape).copy_(tensor)


def _memory(shape: torch.Size) -> Tensor:
    """An fp32 tensor of this shape, whose memory goes back to the system with it.

    The C library keeps memory that it has handed out in pieces of up to 32 MB, and frozen weights go soon: they are
    converted to bf16, or moved to a GPU.
    """
    size = 4 * math.prod(shape)
    if size < PAGES:
        return torch.empty(shape)
    own = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(own, dtype=torch.float32).view(shape)

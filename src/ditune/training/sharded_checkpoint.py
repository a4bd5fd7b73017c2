"""Checkpoints of a network that is spread over the processes: a folder to which each of them writes its own rows.

The tensors are safetensors files of torch.distributed.checkpoint; everything else stands in `checkpoint.json`, with the
hashes of the files. Nothing in the folder is executed when it is read, unlike torch's and Lightning's own forms.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ditune.distributed import in_group, is_spread, rank
from ditune.files.atomic import sha256

FORMAT = "ditune-sharded-checkpoint-1"
INDEX = "checkpoint.json"
TENSOR, SCALAR, PAIRS, TUPLE = "$tensor", "$scalar", "$pairs", "$tuple"  # what JSON has no form for
NAMES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
DTYPES = {name: getattr(torch, name) for name in NAMES}


class Unusable(Exception):
    """Why something is no checkpoint that a training can go on from, as a part of a sentence."""


def write(content: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint into an empty folder; all processes call it, with the same plain values.

    Args:
        content: nested dicts, lists and tuples of plain values and tensors, spread or not.
        folder: that all processes see.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save  # takes seconds to import

    tensors: dict[str, Tensor] = {}
    tree = _packed(content, "", tensors)
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with alone():
        save(dict(tensors), storage_writer=writer, no_dist=not in_group())
    if rank():
        return
    facts = {
        name: {
            "shape": list(tensor.shape),
            "dtype": _name_of(tensor),
            "spread": is_spread(tensor),
        }
        for name, tensor in tensors.items()
    }
    files = {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    index = {"format": FORMAT, "files": files, "tensors": facts, "content": tree}
    (folder / INDEX).write_text(json.dumps(index | {"sha256": _digest(index)}), encoding="utf-8")


def read_index(folder: Path) -> dict[str, Any]:
    """The index of an undamaged checkpoint; every file is hashed once.

    Raises:
        Unusable: a file is missing or has another content than was written.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise Unusable("is none of ours: it has another format")
        if index.pop("sha256", None) != _digest(index):
            raise Unusable(f"is damaged: {INDEX} has another hash than was written with it")
        for name, expected in index["files"].items():
            if Path(name).name != name or sha256(folder / name) != expected:
                raise Unusable(f"is damaged: {name} has another hash than was written with it")
    except FileNotFoundError as error:
        raise Unusable(f"is damaged: {Path(error.filename).name} is missing") from None
    except (OSError, ValueError) as error:
        raise Unusable(f"is damaged ({type(error).__name__})") from None
    return index


def read_facts(folder: Path) -> dict[str, Any]:
    """Content of an undamaged checkpoint whose tensors have shapes and no values.

    Raises:
        Unusable: see `read_index`.
    """
    index = read_index(folder)
    facts = index["tensors"]

    def empty(name: str) -> Tensor:
        return torch.empty(facts[name]["shape"], dtype=DTYPES[facts[name]["dtype"]], device="meta")

    return _unpacked(index["content"], empty)


def read(folder: Path, mesh: Any | None = None) -> dict[str, Any]:
    """Content of a checkpoint; any number of processes reads what any other number has written.

    Args:
        folder: of the checkpoint.
        mesh: over which tensors are spread again, of which each process reads its own rows; None = all are read whole.

    Raises:
        Unusable: see `read_index`.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor import empty as spread_empty

    index = read_index(folder)
    tensors: dict[str, Tensor] = {}
    for name, facts in index["tensors"].items():
        shape, dtype = facts["shape"], DTYPES[facts["dtype"]]
        if mesh is not None and facts["spread"]:
            tensors[name] = spread_empty(*shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
        else:
            tensors[name] = torch.empty(shape, dtype=dtype)
    with alone():
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=mesh is None)
    return _unpacked(index["content"], tensors.__getitem__)


@contextmanager
def whole_or_not_there(path: Path) -> Iterator[Path]:
    """Yield a folder beside `path` that all processes fill; the first one then renames it into place.

    Raises:
        OSError: the first process cannot write; `filename` is `path`.
    """
    temporary, old = (path.with_name(f".{path.name}.{what}") for what in ("partial", "old"))
    if not rank():
        shutil.rmtree(temporary, ignore_errors=True)  # of an earlier start
        temporary.mkdir(parents=True)
    wait()
    try:
        yield temporary
        if rank():
            return
        for file in temporary.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if path.exists():
            path.rename(old)
        temporary.rename(path)
    finally:
        if not rank():
            for folder in (temporary, old):
                shutil.rmtree(folder, ignore_errors=True)


def leftovers(folder: Path) -> list[Path]:
    """What a kill has left of checkpoints that were being written."""
    return [*folder.glob(".*.ckpt.partial"), *folder.glob(".*.ckpt.old")]


def alone() -> warnings.catch_warnings:
    """Silence torch's warning that a process works alone, where that is intended."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def wait() -> None:
    """Until all processes are here."""
    if in_group():
        dist.barrier()


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A nested value as JSON holds it; its tensors are put into `tensors`, by names of where they stood."""
    if isinstance(value, Tensor):
        if not value.ndim:  # the repr of a float64 is exact
            return {SCALAR: value.item(), "dtype": _name_of(value)}
        tensors[name] = value
        return {TENSOR: name}
    if isinstance(value, dict):
        pairs = [(key, _packed(item, f"{name}/{key}" if name else str(key), tensors)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(pairs)
        return {PAIRS: [list(pair) for pair in pairs]}
    if isinstance(value, list | tuple):
        items = [_packed(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
        return {TUPLE: items} if isinstance(value, tuple) else items
    return value


def _unpacked(value: Any, find: Callable[[str], Tensor]) -> Any:
    """The value that `_packed` was given."""
    if isinstance(value, list):
        return [_unpacked(item, find) for item in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return find(value[TENSOR])
    if SCALAR in value:
        return torch.tensor(value[SCALAR], dtype=DTYPES[value["dtype"]])
    if TUPLE in value:
        return tuple(_unpacked(item, find) for item in value[TUPLE])
    pairs = value[PAIRS] if PAIRS in value else value.items()
    return {key: _unpacked(item, find) for key, item in pairs}


def _name_of(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _digest(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()

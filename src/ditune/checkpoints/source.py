"""A file or folder of weights, opened without executing anything, for the modules of formats.

Tensors are mapped from their files: names, types and shapes are there at once, and numbers are read from disk where
they are used.
"""

import argparse
import json
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ditune.checkpoints.inert import Archive
from ditune.checkpoints.state_dicts import StateDict, find
from ditune.checkpoints.weight_files import Weights, find_weights, read_index
from ditune.errors import UserError

TORCH_LEGACY = b"\x80\x02\x8a\n"  # torch's files of before version 1.6 begin with a long number
# what readers raise for damaged and hostile files
UNREADABLE = (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error, RuntimeError, EOFError)
UNREADABLE += (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)
# kinds of containers, as messages call them
KINDS = {
    "folder": "a folder",
    "index": "an index of weight files",
    "safetensors": "a safetensors file",
    "torch": "a torch file",
    "torch legacy": "a torch file of before version 1.6",
    "pickle": "a pickle",
    "torchscript": "a TorchScript program, not weights",
    "zip": "a zip archive, and not one of torch's",
    "empty": "empty: its copy or download was not finished",
    "pointer": "a pointer of Git LFS instead of the file itself: `git lfs pull` fetches that",
    "page": "a web page instead of a file: its download went wrong",
    "unknown": "a file whose first bytes are those of no weights",
}


@dataclass(frozen=True)
class Composed:
    """A tensor that is put together from several of a file, when it is asked for and not before.

    Args:
        shape: of the tensor.
        make: makes it.
        rows: makes some of its rows; None = they are taken from the whole.
    """

    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    rows: Callable[[slice], Tensor] | None = None

    def __getitem__(self, rows: slice) -> Tensor:
        return self.make()[rows] if self.rows is None else self.rows(rows)


@dataclass(frozen=True)
class Content:
    """A network as a file holds it.

    Args:
        build: makes the network.
        config: arguments of `build`.
        tensors: state dict of the network.
        facts: of our own files, which say the hash of themselves and of the tensors; {} = nothing says it.
    """

    build: Callable[..., nn.Module]
    config: dict[str, Any]
    tensors: Mapping[str, Tensor | Composed]
    facts: Mapping[str, Any] = field(default_factory=dict)


class Source:
    """A checkpoint: its path and, opened when first asked for, its content.

    Its attribute `strangers` has the names of classes in a torch file that were passed over; `parts` has the files and
    folders inside of it that were opened.

    Args:
        path: a file or a folder.

    Raises:
        UserError: there is nothing at the path; or, when it is read, it is damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.strangers: set[str] = set()
        self.parts: dict[Path, Source] = {}
        self._archive: Archive | None = None
        if not self.path.exists():
            raise UserError(f"There is no network file {path}. Check the path, or restore it from the repository.")
        facts = self.path.stat()
        self._state = (facts.st_ino, facts.st_size, facts.st_mtime_ns)

    def part(self, path: Path) -> "Source":
        """A file or folder inside of this one; each is opened once."""
        return self.parts.setdefault(path, Source(path))

    @property
    def is_mapped(self) -> bool:
        """Whether the tensors that were opened are mapped from their files; else they are in memory."""
        if self.parts:
            return all(part.is_mapped for part in self.parts.values())
        return self.kind in ("safetensors", "torch")

    @property
    def state(self) -> tuple[tuple[int, ...], ...]:
        """Numbers that change with the files that were opened, as they were then."""
        return tuple(numbers for part in self.parts.values() for numbers in part.state) or (self._state,)

    @cached_property
    def kind(self) -> str:
        """One of `KINDS`, by the first bytes."""
        if self.path.is_dir():
            return "folder"
        with open(self.path, "rb") as file:
            head = file.read(64)
        length = int.from_bytes(head[:8], "little")
        if len(head) > 8 and head[8:9] == b"{" and length < self.path.stat().st_size:
            return "safetensors"
        for start, kind in (
            (b"PK\x03\x04", self._kind_of_zip),
            (TORCH_LEGACY, "torch legacy"),
            (b"\x80", "pickle"),
            (b"version https://git-lfs", "pointer"),
            (b"<", "page"),
        ):
            if head.startswith(start):
                return kind() if callable(kind) else kind
        if head.lstrip().startswith(b"{") and ".index." in self.path.name:
            return "index"
        if self.path.suffix in (".safetensors", ".sft") and head:
            return "safetensors"  # a damaged one
        return "unknown" if head else "empty"

    def _kind_of_zip(self) -> str:
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = {name.rpartition("/")[2] for name in archive.namelist()}
        except zipfile.BadZipFile as error:
            raise self.damaged(error) from error
        if "constants.pkl" in names:
            return "torchscript"
        return "torch" if "data.pkl" in names else "zip"

    @cached_property
    def header(self) -> dict[str, str]:
        """Metadata of a safetensors file, else {}."""
        if self.kind != "safetensors":
            return {}
        try:
            with safe_open(self.path, framework="pt") as file:
                return file.metadata() or {}
        except SafetensorError as error:
            raise self.damaged(error) from error

    @cached_property
    def content(self) -> Any:
        """Tensors of safetensors files, or the object of a torch file without anything that could run."""
        try:
            if self.kind == "safetensors":
                with safe_open(self.path, framework="pt") as file:
                    return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if self.kind in ("torch", "torch legacy"):
                return self._torch()
        except UNREADABLE as error:
            raise self.damaged(error) from error
        files = self.weights.files if self.weights else ()
        return {key: value for file in files for key, value in self.part(file).entries.items()}

    def _torch(self) -> Any:
        """The object of a torch file; objects that are neither tensors nor plain values are passed over."""
        try:
            with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pickle protocols; `Archive` knows them all
                return torch.load(self.path, map_location="cpu", weights_only=True, mmap=self.kind == "torch")
        except UNREADABLE as error:
            if self.kind == "torch":
                self._archive = Archive(self.path)
                self.strangers = self._archive.strangers
                return self._archive.content
            if "unsupported global" not in str(error).lower():
                raise
            raise UserError(
                f"{self.path} holds more than tensors, in torch's format of before version 1.6, and nothing in it was "
                "executed. In the code that made it, save the network's state_dict() alone by torch.save."
            ) from error

    @cached_property
    def weights(self) -> Weights | None:
        """The weight files of a folder or an index."""
        if self.kind == "index":
            files = read_index(self.path)
            return Weights(files, None, files[0].suffix != ".bin")
        return find_weights(self.path) if self.kind == "folder" else None

    @cached_property
    def state_dict(self) -> StateDict | None:
        """The DiT inside the content; None if there is none."""
        found = find(self.content, self.path)
        if found is None or self._archive is None:
            return found
        try:
            read = {k: v if isinstance(v, Tensor) else self._archive.tensor(v) for k, v in found.tensors.items()}
        except pickle.UnpicklingError as error:
            raise self.damaged(error) from error
        return StateDict(found.where, {key: tensor for key, tensor in read.items() if tensor is not None})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The DiT's state dict; {} if there is none."""
        return self.state_dict.tensors if self.state_dict else {}

    @property
    def entries(self) -> dict[str, Tensor]:
        """All tensors of one of several files; a part of a network has no key by which to find the DiT."""
        content = self.content if isinstance(self.content, dict) else {}
        archive = self._archive
        return content if archive is None else {k: archive.tensor(v) for k, v in content.items() if hasattr(v, "shape")}

    def attributes(self) -> dict[str, Any]:
        """Arguments of the training that a file holds beside its weights; {} if it holds none."""
        content = self.content if isinstance(self.content, dict) else {}
        for key in ("args", "hparams", "hyper_parameters", "config"):
            value = content.get(key)
            if isinstance(value, argparse.Namespace | dict):
                return dict(vars(value)) if isinstance(value, argparse.Namespace) else dict(value)
        return {}

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; {} if it is not there.

        Raises:
            UserError: it is damaged.
        """
        path = self.path / name
        if not path.is_file():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise self.damaged(error) from error
        return content if isinstance(content, dict) else {}

    def damaged(self, error: object) -> UserError:
        """The error to raise for damaged content."""
        reason = (str(error).splitlines() or ["it ends too early"])[0]
        return UserError(f"{self.path} is damaged ({reason}). Copy or fetch it again.")

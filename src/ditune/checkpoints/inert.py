"""Torch files whose pickles hold more than tensors, read without any of their objects.

Classes and functions that a pickle names are never looked up. A stand-in takes the place of each; it accepts everything
and does nothing. Only tensors, numpy arrays, argparse.Namespace and plain values keep their content. A configuration,
an optimizer or an attack in the file is passed over, and the weights beside it are read.
"""

import mmap
import pickle
import struct
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# fmt: off
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}
# fmt: on
NUMPY_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")


class Inert:
    """Stand-in for an object of any class; it does nothing."""

    name = ""  # of the class or function that it stands for

    def __new__(cls, *_: object, **__: object) -> Any:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __call__(self, *_: object, **__: object) -> "Inert":
        return self

    def __setstate__(self, state: object) -> None:  # or pickle would set attributes itself
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, value: object) -> None:
        """Do nothing, for objects that a pickle fills as lists."""

    extend = add = update = append


class Table(Inert, dict):
    """Stand-in for an OrderedDict or a defaultdict."""

    def __init__(self, *content: object, **_: object) -> None:
        pairs = content[0] if content and isinstance(content[0], list | tuple | dict) else ()
        dict.update(self, pairs)

    __setitem__ = dict.__setitem__
    update = dict.update


class Namespace(Table):
    """Stand-in for argparse.Namespace; its attributes are the entries."""

    def __setstate__(self, state: object) -> None:
        dict.update(self, state if isinstance(state, dict) else {})


class Storage(Inert):
    """Bytes in the archive, by their key; `dtype` is None for types that are not read."""

    def __init__(self, key: object = "", dtype: torch.dtype | None = None) -> None:
        self.key, self.dtype = str(key), dtype


class StoredTensor(Inert):
    """A dense tensor that is still in the archive; its bytes are read from disk where they are used."""

    storage: Storage | None = None
    shape: tuple[int, ...] = ()

    def __init__(self, *parts: object) -> None:
        self.storage, self.offset, size, stride, *_ = parts
        if not isinstance(self.storage, Storage):
            raise pickle.UnpicklingError("a tensor has no storage")
        self.shape, self.stride = _integers(size), _integers(stride)

    def read(self, archive: "Archive") -> Tensor:
        """The tensor; its errors are made one kind by `Archive.tensor`."""
        flat = torch.frombuffer(archive.bytes_of(self.storage.key), dtype=self.storage.dtype)
        return torch.as_strided(flat, self.shape, self.stride, self.offset)  # which checks the bounds


class Parameter(Inert):
    """Stand-in for a parameter: its tensor."""

    def __new__(cls, data: object = None, *_: object) -> Any:
        return data


class StoredArray(Inert):
    """A numpy array of numbers."""

    shape: tuple[int, ...] = ()
    dtype: "Dtype | None" = None

    def __setstate__(self, state: object) -> None:
        _, shape, self.dtype, self.fortran, self.data = state
        self.shape = _integers(shape)

    def read(self, _: "Archive") -> Tensor:
        """The array as a tensor; its errors are made one kind by `Archive.tensor`."""
        array = np.frombuffer(self.data, np.dtype(self.dtype.order + self.dtype.code))
        array = array.reshape(self.shape, order="F" if self.fortran else "C")
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


class Dtype(Inert):
    """Type of an array; `code` is None for types other than numbers, which are not read."""

    order = "<"

    def __init__(self, code: object = "", *_: object) -> None:
        self.code = code if code in NUMPY_DTYPES else None

    def __setstate__(self, state: object) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else "<"
        self.order = order if order in ("<", ">", "=", "|") else "<"


class Encoded(Inert):
    """Bytes, in the form that the second protocol of pickle writes."""

    def __new__(cls, text: object = "", *_: object) -> Any:
        return text.encode("latin1") if isinstance(text, str) else b""


KNOWN: dict[str, type[Inert]] = {
    "collections.OrderedDict": Table,
    "collections.defaultdict": Table,
    "argparse.Namespace": Namespace,
    "torch._utils._rebuild_tensor_v2": StoredTensor,
    "torch._utils._rebuild_parameter": Parameter,
    "torch._utils._rebuild_parameter_with_state": Parameter,
    "numpy.core.multiarray._reconstruct": StoredArray,
    "numpy._core.multiarray._reconstruct": StoredArray,
    "numpy.dtype": Dtype,
    "_codecs.encode": Encoded,
}
UNREMARKABLE = {"numpy.ndarray", *(f"torch.{name}" for name in STORAGES)}


class _Unpickler(pickle.Unpickler):
    """Builds plain values and stand-ins. Every file has stand-in classes of its own, which no other file can change."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.stand_ins: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in self.stand_ins:
            self.stand_ins[full] = type("StandIn", (KNOWN.get(full, Inert),), {"name": full})
        return self.stand_ins[full]

    def persistent_load(self, pid: object) -> Storage:
        _, kind, key, *_ = pid
        return Storage(key, STORAGES.get(getattr(kind, "name", "").rpartition(".")[2]))

    @property
    def strangers(self) -> set[str]:
        """Names of what was passed over."""
        return set(self.stand_ins) - KNOWN.keys() - UNREMARKABLE


class Archive:
    """A torch file in its zip container, mapped into memory.

    Its attribute `content` is the object in the file, made of plain values, dicts, `StoredTensor`, `StoredArray` and
    stand-ins; `strangers` are the names of classes and functions that were passed over.

    Args:
        path: the file.

    Raises:
        pickle.UnpicklingError: the file is damaged.
        zipfile.BadZipFile: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # what is written stays in memory
            self.entries = {info.filename: info for info in archive.infolist()}
            entry = next((name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"), None)
            if entry is None:
                raise pickle.UnpicklingError("it has no data.pkl")
            self.folder = entry.removesuffix("data.pkl")
            order = f"{self.folder}byteorder"
            if order in archive.namelist() and archive.read(order).decode("latin1") != sys.byteorder:
                raise pickle.UnpicklingError("its byte order is another machine's")
            with archive.open(entry) as file:
                unpickler = _Unpickler(file)
                self.content = _load(unpickler)
        self.strangers = unpickler.strangers

    def tensor(self, value: StoredTensor | StoredArray) -> Tensor | None:
        """Read a tensor or an array of the content; None for types that are not read.

        Raises:
            pickle.UnpicklingError: it reaches beyond its bytes.
        """
        kind = value.storage if isinstance(value, StoredTensor) else value.dtype
        if kind is None or (kind.dtype if isinstance(kind, Storage) else kind.code) is None:
            return None
        try:
            return value.read(self)
        except (RuntimeError, ValueError, TypeError, KeyError, struct.error) as error:
            raise pickle.UnpicklingError(f"a tensor does not fit its bytes ({error})") from error

    def bytes_of(self, key: str) -> memoryview:
        """Bytes of the storage `key`, mapped from the file.

        Raises:
            KeyError: there is none.
            ValueError: it is compressed.
        """
        info = self.entries[f"{self.folder}data/{key}"]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("torch does not compress its files")
        # the entry's own header: 30 bytes, of which the last four are the lengths of its name and of what else it has
        lengths = self.mapped[info.header_offset + 26 : info.header_offset + 30]
        start = info.header_offset + 30 + sum(struct.unpack("<HH", lengths))
        return memoryview(self.mapped)[start : start + info.file_size]


def _load(unpickler: _Unpickler) -> Any:
    """The object of a pickle; a hostile one can fail in any way."""
    try:
        return unpickler.load()
    except zipfile.BadZipFile:
        raise
    except Exception as error:
        raise pickle.UnpicklingError(f"its pickle is no whole one ({error})") from error


def _integers(values: Sequence[object]) -> tuple[int, ...]:
    if not isinstance(values, list | tuple) or not all(isinstance(v, int) and v >= 0 for v in values):
        raise pickle.UnpicklingError("a shape is not made of numbers")
    return tuple(values)

"""Rows of Parquet files, a row group at a time, for one process and all its threads."""

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ditune.errors import UserError
from ditune.memory import host_memory, size
from ditune.progress import meter

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

KEPT = 256 * 2**20  # bytes of row groups in memory; one larger group is kept alone
LARGE = 2**30  # bytes of a row group that are worth a word


def import_pyarrow() -> ModuleType:
    """pyarrow, which only Parquet files need.

    Raises:
        UserError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "Parquet files are read by pyarrow, which is not installed. Run `pip install pyarrow`."
        ) from error
    return pyarrow


class ParquetReader:
    """Open Parquet files and the row groups that were read last; threads take turns.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.process = os.getpid()
        self._pyarrow = import_pyarrow()
        self._folder, self._lock = folder, threading.RLock()
        self._open: dict[str, tuple[pq.ParquetFile, list[int]]] = {}  # and the first row of each row group
        self._groups: OrderedDict[tuple[str, int], pa.ChunkedArray] = OrderedDict()
        self._sizes: dict[str, list[int]] = {}

    def schema(self, file: str) -> "pa.Schema":
        """Columns of a file."""
        return self._file(file)[0].schema_arrow

    def count(self, file: str) -> int:
        """Rows of a file."""
        return self._file(file)[0].metadata.num_rows

    def column(self, file: str, column: str) -> list[Any]:
        """All values of a small column."""
        with self._lock:
            return self._file(file)[0].read([column], use_threads=False)[column].to_pylist()

    def image(self, file: str, row: int, column: str) -> bytes | None:
        """The bytes in a row; None = there are none."""
        with self._lock:
            starts = self._file(file)[1]
            group = bisect_right(starts, row) - 1
            return self._group(file, group, column)[row - starts[group]].as_py()

    def size(self, file: str, row: int, column: str) -> int:
        """Number of bytes in a row; -1 = there are none. The first call for a file reads it."""
        with self._lock:
            if file not in self._sizes:
                self._sizes[file] = self._all_sizes(file, column)
            return self._sizes[file][row]

    def large_groups(self, files: Sequence[str]) -> list[str]:
        """A sentence if row groups are so large that reading one image is slow; else none."""
        sizes = {file: _group_sizes(self._file(file)[0]) for file in files}
        large = [file for file, found in sizes.items() if max(found, default=0) > LARGE]
        if not large:
            return []
        return [
            f"{large[0]} has row groups of up to {max(sizes[large[0]]) / 1e9:.1f} GB, and each is read whole for one "
            "image. Write it again with row_group_size=100."
        ]

    def _file(self, file: str) -> "tuple[pq.ParquetFile, list[int]]":
        with self._lock:
            if file not in self._open:
                path = self._folder / file
                try:
                    found = self._pyarrow.parquet.ParquetFile(path)
                except (OSError, ValueError) as error:
                    reason = " ".join(str(error).split())
                    raise UserError(
                        f"{path} is no whole Parquet file ({reason}). Copy or download it again."
                    ) from error
                if found.metadata.num_rows > path.stat().st_size:
                    raise UserError(
                        f"{path} claims {found.metadata.num_rows:,} rows, and has {path.stat().st_size:,} bytes in "
                        "all. Copy or download it again."
                    )
                groups = [found.metadata.row_group(i).num_rows for i in range(found.num_row_groups)]
                self._open[file] = found, list(accumulate(groups, initial=0))[:-1]
            return self._open[file]

    def _group(self, file: str, group: int, column: str) -> "pa.ChunkedArray":
        """The bytes of all images of a row group."""
        from pyarrow import compute

        key = (file, group)
        if key not in self._groups:
            claimed, (free, _) = self._file(file)[0].metadata.row_group(group).total_byte_size, host_memory()
            if claimed > free:
                raise UserError(
                    f"Row group {group} of {self._folder / file} claims {size(claimed)}, and {size(free)} of memory "
                    "are free. Write it again with row_group_size=100, or take a machine that has more."
                )
            content = self._file(file)[0].read_row_group(group, [column], use_threads=False)[column]
            is_struct = self._pyarrow.types.is_struct(content.type)
            self._groups[key] = compute.struct_field(content, "bytes") if is_struct else content
            while len(self._groups) > 1 and sum(kept.nbytes for kept in self._groups.values()) > KEPT:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def _all_sizes(self, file: str, column: str) -> list[int]:
        from pyarrow import compute

        sizes: list[int] = []
        groups = self._file(file)[0].num_row_groups
        with meter("reading sizes of images", groups, "row groups") as shown:
            for group in range(groups):
                lengths = compute.binary_length(self._group(file, group, column))
                sizes += compute.fill_null(lengths, -1).to_pylist()
                shown.advance()
        return sizes


def _group_sizes(file: "pq.ParquetFile") -> list[int]:
    return [file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)]

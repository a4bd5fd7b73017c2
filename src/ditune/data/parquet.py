"""Parquet files of image bytes with a label column, as Hugging Face `datasets` exports them.

data/train-00000-of-00002.parquet: the split is in the path; columns image {bytes, path}, label. Names of the classes
stand in the schema's metadata (ClassLabel), or the labels are text. Only the row group of an image is read for it.
"""

import json
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ditune.data.parquet_reader import ParquetReader, import_pyarrow
from ditune.data.sources import ONE_CLASS, Item
from ditune.data.splits import is_split, normal_split, refuse_two_spellings
from ditune.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img", "images", "picture"), ("label", "labels")


class Parquet:
    """Parquet files below a folder; an image is called <file>/<number of its row>.

    Args:
        folder: that the files lie in.
        names: of the files, relative.
        path: what the user has given, for messages.

    Raises:
        UserError: pyarrow is not installed, a file is damaged, or there is no column of image bytes.
    """

    knows_sizes = False

    def __init__(self, folder: Path, names: Sequence[str], path: Path) -> None:
        self.path, self.folder, self.files = path, folder, sorted(names)
        self.others: list[str] = []
        self.notes = _lacking_shards(self.files, path)
        self._local: ParquetReader | None = None
        self.columns = self._reader.schema(self.files[0]).names
        self.image_column = self._find_image_column()
        self.names = [_name(file, i) for file in self.files for i in range(self._reader.count(file))]
        self.notes += self._reader.large_groups(self.files)

    # The interface of a source

    def read(self, name: str) -> bytes:
        """The bytes of an image.

        Raises:
            ValueError: its row holds none.
        """
        content = self._reader.image(*_row(name), self.image_column)
        if content is None:
            raise ValueError("the row holds no bytes of an image")
        return content

    def size(self, name: str) -> int:
        """Bytes of the image; -1 when its row holds none."""
        return self._reader.size(*_row(name), self.image_column)

    def crc(self, name: str) -> int:
        """CRC-32 of the bytes; reads them."""
        return zlib.crc32(self.read(name))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_local": None}

    @property
    def _reader(self) -> ParquetReader:
        # A forked worker must not share open files and locks with its parent.
        if self._local is None or self._local.process != os.getpid():
            self._local = ParquetReader(self.folder)
        return self._local

    # What the files say about the images

    def items(self, class_column: str | None) -> tuple[list[Item], list[str]]:
        """One item for each row that has a label, and sentences about what was left out or decided.

        Raises:
            UserError: there is no such column, or its values are no classes.
        """
        column, notes = self._label_column(class_column)
        splits = self._splits(notes)
        items, unlabelled = [], 0
        for file in self.files:
            labels = self._labels(file, column) if column else None
            split_column = self._reader.column(file, "split") if splits is None else None
            for i in range(self._reader.count(file)):
                label = ONE_CLASS if labels is None else labels[i]
                if label is None:
                    unlabelled += 1
                    continue
                name = _name(file, i)
                split = splits[file] if splits is not None else normal_split(str(split_column[i]))
                row = {"file_name": name} | ({column: label} if column else {})
                items.append(Item(self, name, label, split, row))
        if unlabelled:
            notes.append(f"Rows of {self.path} left out, because they have no label in '{column}': {unlabelled:,}.")
        if not items:
            raise UserError(f"There are no images in {self.path} with a label in '{column}'. Set data.class_column.")
        return items, notes

    def class_labels(self) -> list[str] | None:
        """Names of the classes in the order of the schema that `datasets` writes; None = it names none."""
        column, _ = self._label_column(None)
        return _class_labels(self._reader.schema(self.files[0]), column) if column else None

    def _find_image_column(self) -> str:
        schema = self._reader.schema(self.files[0])
        found = [field.name for field in schema if _holds_images(field)]
        named = [name for name in found if name.lower() in IMAGE_COLUMNS]
        if len(found) != 1 and len(named) != 1:
            which = f"several ({', '.join(found)}), none or several named 'image'" if found else "none"
            raise UserError(
                f"{self.path} must have one column of image bytes, as `datasets` writes them; it has {which}. "
                f"Its columns are: {', '.join(schema.names)}. Rename that of the images to 'image'."
            )
        column = (named if len(named) == 1 else found)[0]
        for file in self.files:
            if column not in self._reader.schema(file).names:
                raise UserError(f"{self.folder / file} has no column '{column}', as {self.files[0]} has. Take it away.")
        return column

    def _label_column(self, asked: str | None) -> tuple[str | None, list[str]]:
        others = [name for name in self.columns if name != self.image_column]
        lacking = [file for file in self.files if asked is not None and asked not in self._reader.schema(file).names]
        if lacking:
            raise UserError(
                f"{self.folder / lacking[0]} has no column '{asked}', which class_column asks for. "
                f"It has these: {', '.join(others)}."
            )
        if asked is not None:
            return asked, []
        found = next((name for name in LABEL_COLUMNS if name in self.columns), None)
        if found is None:
            names = ", ".join(others) or "none"
            return None, [f"{self.path} has no column 'label', so all images are one class; other columns: {names}."]
        return found, []

    def _labels(self, file: str, column: str) -> list[str | None]:
        """Class of each row of a file; None = it has none."""
        schema = self._reader.schema(file)
        if column not in schema.names:
            raise UserError(f"{self.folder / file} has no column '{column}', as {self.files[0]} has. Take it away.")
        names = _class_labels(schema, column)
        if not _is_plain(schema.field(column).type):
            raise UserError(
                f"The column '{column}' of {self.folder / file} holds {schema.field(column).type}, not text or whole "
                "numbers, so it names no class. Choose another column with data.class_column."
            )
        values = self._reader.column(file, column)
        if names is None:
            return [None if v is None or v == "" else str(v) for v in values]
        outside = next((v for v in values if isinstance(v, int) and v >= len(names)), None)
        if outside is not None:
            raise UserError(
                f"{self.folder / file} has the label {outside} in '{column}', but its schema names {len(names)} "
                "classes. Export it again."
            )
        # datasets writes -1 where a test split has no labels
        return [None if v is None or v == -1 else names[v] if isinstance(v, int) else str(v) for v in values]

    def _splits(self, notes: list[str]) -> dict[str, str | None] | None:
        """Split of each file by its path (None = by hash); no answer = there is a column for it."""
        found = {file: _split_word(file) for file in self.files}
        words = {word for word in found.values() if word is not None}
        if not words:
            has_column = all("split" in self._reader.schema(file).names for file in self.files)
            return None if has_column else dict.fromkeys(self.files)
        other = next((file for file, word in found.items() if word is None), None)
        if other is not None:
            named = next(file for file, word in found.items() if word is not None)
            raise UserError(
                f"{named} in {self.path} names a split, and {other} beside it names none. "
                "Name the split at the beginning of every file (train-..., test-...), or take the other files away."
            )
        refuse_two_spellings(words, self.path)
        splits = {file: normal_split(word) for file, word in found.items() if word is not None}
        if set(splits.values()) != {"train"}:
            return splits
        notes.append(
            f"There is only the split 'train' in {self.path}: a tenth of it, by a hash of file and row, is 'test'."
        )
        return dict.fromkeys(self.files)


def _name(file: str, row: int) -> str:
    return f"{file}/{row:08d}"


def _row(name: str) -> tuple[str, int]:
    file, _, row = name.rpartition("/")
    return file, int(row)


def _holds_images(field: "pa.Field") -> bool:
    types = import_pyarrow().types
    kind = field.type
    if types.is_struct(kind):
        kind = next((kind.field(i).type for i in range(kind.num_fields) if kind.field(i).name == "bytes"), kind)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _is_plain(kind: "pa.DataType") -> bool:
    """Whether values of this type can name a class."""
    types = import_pyarrow().types
    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    checks = (types.is_string, types.is_large_string, types.is_integer, types.is_boolean, types.is_null)
    return any(check(kind) for check in checks)


def _class_labels(schema: "pa.Schema", column: str) -> list[str] | None:
    """Names of the classes as `datasets` writes them into the schema; None = there are none."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None  # files of other programs
    return [str(name) for name in names] if isinstance(names, list) else None


def _split_word(file: str) -> str | None:
    """What names the split in a path: data/train-00000-of-00002.parquet, default/validation/0000.parquet."""
    for part in reversed(PurePosixPath(file).with_suffix("").parts):
        found = [word for word in re.split(r"[^A-Za-z]+", part) if is_split(word)]
        if found:
            return found[0]
    return None


def _lacking_shards(files: Sequence[str], path: Path) -> list[str]:
    """A sentence for each series of files, such as train-00000-of-00005.parquet, that is not whole."""
    series: dict[tuple[str, int], int] = {}
    for match in filter(None, (re.match(r"(.*)-\d+-of-(\d+)", file) for file in files)):
        key = (match[1], int(match[2]))
        series[key] = series.get(key, 0) + 1
    return [
        f"Only {count} of the {total} files {name}-*-of-{total:05d} are in {path}; images are read from these alone."
        for (name, total), count in series.items()
        if count < total
    ]

"""Labelled pictures from zip files and folders, as one map-style data set that hands out whole batches.

A source with a `metadata.csv` at its root (column file_name and any others, the layout of imagefolder in Hugging Face
datasets) takes class and split from columns. Any other source is a tree [train|test|val/]class/.../picture.png.
"""

import csv
import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ditune.data.manifest import apply_manifest
from ditune.data.sources import METADATA, SPLIT_FOLDERS, Folder, Item, Zip, is_picture, open_source
from ditune.data.transforms import center_crop, to_rgb
from ditune.errors import UserError

ONE_CLASS = "all"  # class of pictures that lie in no folder
# What Pillow, zipfile and the file system raise for damaged, truncated, missing, encrypted or absurdly large files.
BROKEN = (OSError, ValueError, SyntaxError, RuntimeError, EOFError, TypeError, IndexError)
BROKEN += (struct.error, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError)


class Pictures(Dataset):
    """uint8 RGB pictures with int64 labels, centre-cropped to `resolution`; one of that size already is unchanged.

    sources       zip files or folders (one or several), read in this order
    resolution    side of the square pictures, in pixels
    split         name of the split; None = all. From the column `split`, or from top folders train/ and test/ or val/.
                  A source with neither is split by a hash of each file's path: a tenth is 'test', the rest 'train'.
                  'train.val' is a tenth of 'train', by such a hash too, and 'train.fit' the rest: to search settings.
    class_column  column of metadata.csv that names the class; None, or no metadata.csv = the first folder
    classes       class names in the order of their labels, or a text file with one a line;
                  None = the sorted names of all splits of all sources (as text: '10' comes before '2')
    in_memory     decode everything at the first access, or in `load()`; call that before worker processes start,
                  else each of them decodes for itself. False = decode what is asked for.
    limit         keep this many (at least 1), evenly spaced over the sorted pictures; None = all
    manifest      file written by src/prepare.py; where it is there, pictures that it skips are left out

    Sorted by (source, file name). `labels` (N,) int64; `class_names`, `num_classes`; `names` and `rows` (N entries).
    A DataLoader over it needs `collate_fn` to be the identity, since `__getitems__` returns a batch.
    Raises UserError when sources, columns or classes do not fit together; a broken picture when it is first decoded.
    """

    def __init__(
        self,
        sources: str | Path | Sequence[str | Path],
        resolution: int,
        split: str | None = None,
        class_column: str | None = None,
        classes: str | Path | Sequence[str] | None = None,
        in_memory: bool = True,
        limit: int | None = None,
        manifest: str | Path | None = None,
    ) -> None:
        paths = [sources] if isinstance(sources, (str, Path)) else list(sources)
        found = [item for path in paths for item in _read_items(open_source(path), class_column)]
        self.fill(found, _class_names(classes, found), resolution, split, in_memory, limit, manifest)

    def fill(
        self,
        found: list[Item],
        class_names: list[str],
        resolution: int,
        split: str | None,
        in_memory: bool,
        limit: int | None,
        manifest: str | Path | None,
    ) -> None:
        """Take the pictures of one split out of all that were found."""
        self.class_names, self.everything = class_names, found
        self.checksums, kept = apply_manifest(found, manifest)
        items = kept if split is None else [item for item in kept if _is_in(item, split)]
        if not items:
            splits = ", ".join(sorted({item.split for item in found}))
            raise UserError(f"There is no picture in the split '{split}'. The sources have these splits: {splits}.")
        if limit is not None and limit < 1:
            raise UserError(f"`limit` is {limit}, which leaves no picture. Give 1 or more, or leave it out for all.")
        if limit is not None and limit < len(items):
            items = [items[i * len(items) // limit] for i in range(limit)]
        self.resolution, self.split, self.in_memory = resolution, split, in_memory
        self.names = [item.name for item in items]
        self.rows = [item.row for item in items]
        index = {name: label for label, name in enumerate(self.class_names)}
        self.labels = torch.tensor([index[item.class_name] for item in items], dtype=torch.int64)  # (N,)
        self._items = items
        self._decoded: Tensor | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what is in this data set, wherever it lies: names, CRCs, labels, classes, resolution, split.

        A manifest makes it quick and nothing else: a run that began before there was one goes on.
        """
        contents = [
            (item.name, self.checksums[item] if self.checksums else item.source.crc(item.name), label)
            for item, label in zip(self._items, self.labels.tolist(), strict=True)
        ]
        text = json.dumps([contents, self.class_names, self.resolution, self.split])
        return hashlib.sha256(text.encode()).hexdigest()

    def load(self) -> Tensor:
        """All pictures, uint8 (N, 3, R, R); decoded once and kept, so do not change them in place."""
        if self._decoded is None:
            with ThreadPoolExecutor(2) as pool:
                self._decoded = torch.stack(list(pool.map(self._decode, self._items)))
        return self._decoded

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """uint8 (3, R, R) and its label, int64 ()."""
        pictures, labels = self.__getitems__([i])
        return pictures[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, R, R) and labels (B,) int64."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        if self.in_memory:
            return self.load()[index], self.labels[index]
        return torch.stack([self._decode(self._items[i]) for i in index.tolist()]), self.labels[index]

    def take(self, indices: Sequence[int], mirrored: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `__getitems__`; where `mirrored` (B,) is True, left and right are exchanged."""
        pictures, labels = self.__getitems__(indices)
        if mirrored is not None:
            pictures = torch.where(mirrored[:, None, None, None], pictures.flip(-1), pictures)
        return pictures, labels

    def _decode(self, item: Item) -> Tensor:
        try:
            return decode(item.source.read(item.name), self.resolution)
        except BROKEN as error:
            raise UserError(
                f"The picture {item.name} in {item.source.path} cannot be read ({error}). Replace it or take it out; "
                "`python src/prepare.py` with policy=skip leaves out all that are broken."
            ) from error


def decode(content: bytes, resolution: int) -> Tensor:
    """The picture in a file's bytes, uint8 (3, R, R); one of `BROKEN` when there is none."""
    with Image.open(io.BytesIO(content)) as image:
        square = center_crop(to_rgb(image), resolution)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()  # (3, R, R)


def _read_items(source: Folder | Zip, class_column: str | None) -> list[Item]:
    items = _from_metadata(source, class_column) if METADATA in source.names else _from_folders(source)
    if not items:
        raise UserError(
            f"There are no pictures in {source.path}. "
            "Give a folder or zip file with png, jpg, webp, bmp, tiff or gif files, one folder for each class."
        )
    return sorted(items, key=lambda item: item.name)


def _from_metadata(source: Folder | Zip, class_column: str | None) -> list[Item]:
    """One item for each row of metadata.csv; pictures that it does not name are left out."""
    try:
        text = source.read(METADATA).decode("utf-8-sig")
    except BROKEN as error:
        raise UserError(
            f"{METADATA} in {source.path} cannot be read ({error}). Save it as plain UTF-8 text."
        ) from error
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="")
    rows, columns, present = list(reader), reader.fieldnames or [], set(source.names)
    for column in ["file_name"] + [class_column] * (class_column is not None):
        if column not in columns:
            raise UserError(
                f"{METADATA} in {source.path} has no column '{column}'. It has these: {', '.join(columns)}."
            )
    items = []
    for line, row in enumerate(rows, start=2):
        name = row["file_name"]
        class_name = row[class_column] if class_column else _first_folder(name)
        if name not in present:
            raise UserError(
                f"{METADATA} in {source.path} names '{name}', which is not there. Add the file or remove the row."
            )
        if not class_name:
            raise UserError(
                f"Row {line} of {METADATA} in {source.path} has nothing in the column '{class_column}'. "
                "Fill it in or remove the row."
            )
        split = row["split"] if "split" in columns else hashed_split(name)
        items.append(Item(source, name, class_name, split, row))
    return items


def _from_folders(source: Folder | Zip) -> list[Item]:
    names = [name for name in source.names if is_picture(name)]
    tops = {PurePosixPath(name).parts[0] for name in names}
    has_splits = "train" in tops and len(tops & SPLIT_FOLDERS) > 1
    items = []
    for name in names:
        inside = name.partition("/")[2] if has_splits else name
        split = name.partition("/")[0] if has_splits else hashed_split(name)
        items.append(Item(source, name, _first_folder(inside), split, {"file_name": name}))
    loose = [item for item in items if item.class_name == ONE_CLASS]
    if 0 < len(loose) < len(items):
        raise UserError(
            f"The picture {loose[0].name} in {source.path} lies beside the folders of the classes. "
            "Move it into the folder of its class."
        )
    return items


def _first_folder(name: str) -> str:
    folder, slash, _ = name.partition("/")
    return folder if slash else ONE_CLASS


def hashed_split(name: str) -> str:
    """The same for a path on every machine, whatever else is in the source."""
    return "test" if int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % 10 == 0 else "train"


def _is_in(item: Item, split: str) -> bool:
    whole, dot, part = split.partition(".")
    if not dot:
        return item.split == split
    held_out = hashed_split(f"held out of {whole}: {item.name}") == "test"
    return item.split == whole and part == ("val" if held_out else "fit")


def _class_names(classes: str | Path | Sequence[str] | None, items: list[Item]) -> list[str]:
    if classes is None:
        return sorted({item.class_name for item in items})
    if isinstance(classes, (str, Path)):
        path = Path(classes).expanduser()
        if not path.is_file():
            raise UserError(f"There is no file {path}, where class names are expected, one a line. Correct the path.")
        classes = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    names = [str(name) for name in classes]
    unknown = next((item for item in items if item.class_name not in set(names)), None)
    if unknown is not None:
        raise UserError(
            f"The picture {unknown.name} in {unknown.source.path} has the class '{unknown.class_name}', "
            f"which is not one of the {len(names)} in `classes`. Add it there, or leave `classes` out."
        )
    return names

"""Labelled images from folders, zip and Parquet files, as one map-style dataset that hands out whole batches.

`layouts` says how class and split are found; docs/guide/data.md shows every layout.
"""

import hashlib
import json
import logging
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ditune.ahead import ahead
from ditune.data.classes import SHOWN, class_names_of, notes_on_classes, read_classes, untrained_classes
from ditune.data.formats import count_kinds, left_out
from ditune.data.layouts import read_items
from ditune.data.manifest import apply_manifest, refuse_replaced, replaced
from ditune.data.sources import Item, open_source
from ditune.data.splits import in_fraction, is_in, normal_split, settle
from ditune.data.transforms import decode
from ditune.errors import UserError
from ditune.files.needs import Addresses, Need
from ditune.progress import meter

log = logging.getLogger(__name__)

DECODED = 64  # images that wait for the one before them at most, while threads decode

# What Pillow, zipfile and the file system raise for damaged, truncated, missing, encrypted or absurdly large files.
BROKEN = (OSError, ValueError, SyntaxError, RuntimeError, EOFError, TypeError, IndexError, MemoryError)
BROKEN += (struct.error, zlib.error, zipfile.BadZipFile, Image.DecompressionBombError)


class ImageDataset(Dataset):
    """uint8 RGB images with int64 labels, centre-cropped to `resolution`; an image of that size is unchanged.

    Images are sorted by (source, file name). A DataLoader over it needs the identity as `collate_fn`, because
    `__getitems__` returns a batch. Attributes: `labels` (N,) int64; `class_names`; `names` and `rows` (N entries);
    `notes`, sentences about what was left out and decided; `not_images`, numbers of such files by the end of their
    names; `untrained`, classes without a training image.

    Args:
        sources: folders, zip or Parquet files (one or several), read in this order.
        resolution: side of the square images, in pixels.
        split: name of the split (or a usual other spelling of it); None = all. It is taken from the column `split`, or
            from top folders train/, val/, test/. A source with neither, or with train/ alone, is split by a hash of
            each file's path: a tenth is 'test', the rest 'train'; every class keeps an image in 'train'. 'train.val' is
            a tenth of 'train', by such a hash too, and 'train.fit' the rest: to search settings. If 'test' is asked for
            and only 'val' is there, 'val' is used, with a warning.
        class_column: column of the metadata that names the class (must be there); None = the first folder.
        classes: class names in the order of their labels, or a text file with one per line; None = the sorted names of
            all splits of all sources (as text: '10' comes before '2').
        in_memory: decode everything at the first access, or in `load()`; call that before worker processes start, else
            each of them decodes for itself. False = decode what is asked for.
        limit: keep this many (at least 1), evenly spaced over the sorted images; None = all.
        manifest: file written by src/prepare.py; if it exists, images that it calls broken are left out.

    Raises:
        UserError: sources, columns or classes do not fit together; or, when it is first decoded, an image is broken.
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
        listed = read_classes(classes)
        places = [open_source(path, listed or ()) for path in paths]
        read = [read_items(place, class_column, listed or ()) for place in places]
        kinds = [count_kinds(place.others) for place in places]
        notes = [
            sentence
            for place, others, (_, notes) in zip(places, kinds, read, strict=True)
            for sentence in [*notes, *left_out(place.path, others)]
        ]
        found = settle([item for items, _ in read for item in items])
        split = _test_or_val(split, found)
        self.fill(found, class_names_of(listed, found), resolution, split, in_memory, limit, manifest, notes)
        self.not_images = dict(sum(map(Counter, kinds), Counter()))

    @classmethod
    def needs(cls, config: Mapping[str, Any], addresses: Addresses) -> list[Need]:
        """The sources; see `ditune.files.needs`."""
        sources = config["sources"]
        paths = [Path(source).expanduser() for source in ([sources] if isinstance(sources, str) else sources)]
        remedy = "Correct the path, or set data.root=<folder, zip or Parquet files>."
        return [Need("images", p, p.exists(), remedy=f"There is nothing at {p}. {remedy}") for p in paths]

    def fill(
        self,
        found: list[Item],
        class_names: list[str],
        resolution: int,
        split: str | None,
        in_memory: bool,
        limit: int | None,
        manifest: str | Path | None,
        notes: Sequence[str] = (),
    ) -> None:
        """Keep the images of one split.

        Args:
            found: images of all splits.
            class_names: in the order of their labels.
            resolution: as of the class.
            split: as of the class.
            in_memory: as of the class.
            limit: as of the class.
            manifest: as of the class.
            notes: sentences about what was left out and decided.

        Raises:
            UserError: the split has no images, `limit` is below 1, or the manifest is of other images or files.
        """
        self.class_names, self.everything = class_names, found
        known, kept = apply_manifest(found, manifest)
        items = kept if split is None else [item for item in kept if is_in(item, split)]
        if not items:
            splits = ", ".join(sorted({item.split for item in found}))
            raise UserError(f"There is no image in the split '{split}'. The sources have these splits: {splits}.")
        if limit is not None and limit < 1:
            raise UserError(f"`limit` is {limit}, which leaves no image. Give 1 or more, or leave it out for all.")
        if limit is not None and limit < len(items):
            items = [items[i * len(items) // limit] for i in range(limit)]
        self.resolution, self.split, self.in_memory = resolution, split, in_memory
        self.suffix = ""  # of the folder of latents
        self._known, self._said = known, list(notes)
        self._keep(items, kept)
        refuse_replaced(items, self._known)
        self.not_images: dict[str, int] = {}

    def part(self, fraction: float | None) -> "ImageDataset":
        """A share of the images, chosen by a hash of each file's name alone; smaller shares lie in larger ones.

        Args:
            fraction: share of the images, in (0, 1]; None = all.

        Returns:
            The dataset itself, which has no other images any more.

        Raises:
            UserError: no image is left.
        """
        if fraction is None:
            return self
        items = [item for item in self._items if in_fraction(item.name, fraction)]
        if not items:
            raise UserError(f"data.fraction is {fraction}, which leaves none of {len(self):,} images. Raise it.")
        self.suffix += f"_{fraction:g}"
        self._keep(items, items)
        return self

    def subset(self, rows: Sequence[int]) -> "ImageDataset":
        """Some of the images.

        Args:
            rows: their places, ascending; those of all leave everything as it is.

        Returns:
            The dataset itself, which has no other images any more.
        """
        if len(rows) == len(self):
            return self
        items = [self._items[i] for i in rows]
        names = "\n".join(item.name for item in items)
        self.suffix += f"_{hashlib.sha256(names.encode()).hexdigest()[:8]}"
        self._keep(items, items)
        return self

    def _keep(self, items: list[Item], kept: list[Item]) -> None:
        """Have these images and no others; `kept` are those of all splits."""
        self._known = {item: self._known[item] for item in items} if self._known else {}
        self.names = [item.name for item in items]
        self.rows = [item.row for item in items]
        index = {name: label for label, name in enumerate(self.class_names)}
        self.labels = torch.tensor([index[item.class_name] for item in items], dtype=torch.int64)  # (N,)
        self._items = items
        self._decoded: Tensor | None = None
        self.__dict__.pop("fingerprint", None)  # of the images before
        trains = self.split is not None and normal_split(self.split.partition(".")[0]) == "train"
        trained_on = items if trains else [item for item in kept if item.split == "train"]
        self.untrained = untrained_classes(self.class_names, self.everything, trained_on)
        self.notes = [*self._said, *notes_on_classes(self.class_names, self.everything, self.untrained)]

    def describe_classes(self) -> str:
        """One line such as '3 classes: cat 12, dog 10, owl 1': the first ten, and the smallest of more."""
        counts = dict(zip(self.class_names, self.labels.bincount(minlength=self.num_classes).tolist(), strict=True))
        shown = ", ".join(f"{name} {count:,}" for name, count in list(counts.items())[:SHOWN])
        head = f"{len(counts):,} {'class' if len(counts) == 1 else 'classes'}: {shown}"
        if len(counts) <= SHOWN:
            return head
        smallest = min(counts, key=counts.__getitem__)
        return f"{head} and {len(counts) - SHOWN:,} more; the smallest is {smallest} with {counts[smallest]:,}"

    @property
    def checksums(self) -> dict[Item, int]:
        """CRC-32 of each image of this split, as the manifest has it; {} without a manifest."""
        return {item: known.crc32 for item, known in self._known.items()}

    @property
    def num_classes(self) -> int:
        """Number of classes, with those that have no image in this split."""
        return len(self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content, independent of its place: names, CRCs, labels, classes, resolution, split.

        A manifest makes it faster and does not change it: a run that started without one can resume with one.
        """
        contents = []
        with meter("reading checksums", len(self), "images") as shown:
            for item, label in zip(self._items, self.labels.tolist(), strict=True):
                crc = self._known[item].crc32 if self._known else item.source.crc(item.name)
                contents.append((item.name, crc, label))
                shown.advance()
        text = json.dumps([contents, self.class_names, self.resolution, self.split])
        return hashlib.sha256(text.encode()).hexdigest()

    def load(self) -> Tensor:
        """All images, uint8 (N, 3, R, R); decoded once and kept, so do not change them in place."""
        if self._decoded is None:
            with meter("decoding images", len(self), "images") as shown:
                decoded = []
                for image in ahead(self._decode, self._items, DECODED):
                    decoded.append(image)
                    shown.advance()
            self._decoded = torch.stack(decoded)
        return self._decoded

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        """uint8 (3, R, R) and its label, int64 ()."""
        images, labels = self.__getitems__([i])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, R, R) and labels (B,) int64."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        if self.in_memory:
            return self.load()[index], self.labels[index]
        return torch.stack([self._decode(self._items[i]) for i in index.tolist()]), self.labels[index]

    def take(self, indices: Sequence[int], mirrored: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images and labels at given positions, some of them mirrored.

        Args:
            indices: B positions.
            mirrored: (B,) bool, True = exchange left and right; None = none.

        Returns:
            uint8 (B, 3, R, R) and labels (B,) int64.
        """
        images, labels = self.__getitems__(indices)
        if mirrored is not None:
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images, labels

    def _decode(self, item: Item) -> Tensor:
        try:
            content = item.source.read(item.name)
            if self._known and zlib.crc32(content) != self._known[item].crc32:
                raise replaced(item)
            return decode(content, self.resolution)
        except BROKEN as error:
            raise UserError(
                f"The image {item.name} in {item.source.path} cannot be read ({error}). Replace it or take it out; "
                "`python src/prepare.py` with policy=skip leaves out all that are broken."
            ) from error


Pictures = ImageDataset  # its name in configs


def _test_or_val(split: str | None, items: list[Item]) -> str | None:
    """'val' where the split 'test' is asked for, which is not there; nothing else is replaced."""
    there = {item.split for item in items}
    if split is None or normal_split(split) != "test" or "test" in there or "val" not in there:
        return split
    log.warning("There is no split 'test' in the data; its split 'val' is used instead.")
    return "val"

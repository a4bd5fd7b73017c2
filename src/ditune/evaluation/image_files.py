"""Images to evaluate from a folder or zip file of any layout: every image counts once, and none has a class."""

import hashlib
import io
import json
import logging
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from torch import Tensor

from ditune.data.formats import decoders, is_image
from ditune.data.images import BROKEN
from ditune.data.layouts import ONE_CLASS
from ditune.data.parquet import Parquet
from ditune.data.sources import Folder, Zip, open_source
from ditune.data.transforms import decode
from ditune.errors import UserError
from ditune.progress import meter

log = logging.getLogger(__name__)

ARRAYS = (".npz", ".npy")
# what src/sample.py and src/evaluate.py write for people to look at, and the files by which their folders are known
SHEETS, OURS = ("grid*.png", "nearest.png"), ("samples*.json", "result.json")
NAMED = 3  # files that a message names


class ImageFiles:
    """uint8 (N, 3, R, R) images of a folder or zip file, in the order of their names; an image set for the metrics.

    Hidden files are passed over, and so are grid.png and nearest.png where src/sample.py or src/evaluate.py wrote them.
    What is no image, and images of another size, which are resized and centre-cropped, are said in the log.

    Args:
        path: of the folder or zip file; folders in it are searched too.
        resolution: R, the side that the images get.

    Raises:
        UserError: there is nothing at the path, there are no images in it, or some cannot be read.
    """

    def __init__(self, path: str | Path, resolution: int) -> None:
        if Path(path).suffix.lower() in ARRAYS:
            raise UserError(f"{path} is a file of numpy. Give it as npz={path}.")
        self.source, self.resolution = open_source(path), resolution
        if isinstance(self.source, Parquet):
            raise UserError(f"{path} is Parquet, which data.root= reads. Give images= a folder or zip file of images.")
        sheets = set(sheets_among(self.source.names))
        self.names = [name for name in self.source.names if is_image(name) and name not in sheets]
        self.others = Counter(
            PurePosixPath(name).suffix.lower() or "no extension" for name in self.source.names if not is_image(name)
        )
        self.sheets = len(sheets)
        if not self.names:
            found = f", but files of other kinds: {said(self.others)}" if self.others else ""
            raise UserError(f"There are no images in {path}{found}. Give a folder or zip file of png or jpg files.")
        self.sizes, self.fingerprint = self._scan()
        self._say()

    @property
    def facts(self) -> dict[str, object]:
        """For result.json: what was passed over and what was resized."""
        return {"passed_over": dict(self.others), "sheets_passed_over": self.sheets, "resized": dict(self.resized)}

    @property
    def resized(self) -> Counter[str]:
        """How many images of each other size there were, as width x height."""
        own = (self.resolution, self.resolution)
        return Counter({f"{size[0]} x {size[1]}": count for size, count in self.sizes.most_common() if size != own})

    def __len__(self) -> int:
        return len(self.names)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, R, R); the labels are unknown, -1."""
        with ThreadPoolExecutor(2) as pool:
            images = list(pool.map(self._decode, (self.names[i] for i in indices)))
        return torch.stack(images), torch.full((len(indices),), -1)

    def _decode(self, name: str) -> Tensor:
        try:
            return decode(self.source.read(name), self.resolution)
        except BROKEN as error:
            raise broken(self.source, {name: error}) from error

    def _scan(self) -> tuple[Counter[tuple[int, int]], str]:
        """How often each size (width, height) occurs, and a hash of all contents."""
        sizes, contents, failed = Counter(), [], {}
        with meter("reading images", len(self.names)) as progress, ThreadPoolExecutor(2) as pool:
            looked = pool.map(partial(look, self.source), self.names)
            for name, found in zip(self.names, looked, strict=True):
                progress.advance()
                if isinstance(found, Exception):
                    failed[name] = found
                    continue
                size, crc = found
                sizes[size] += 1
                contents.append((name, crc, 0))
        if failed:
            raise broken(self.source, failed)
        text = json.dumps([contents, [ONE_CLASS], self.resolution, None])  # as of a dataset of one class
        return sizes, hashlib.sha256(text.encode()).hexdigest()

    def _say(self) -> None:
        path, count, side = self.source.path, len(self.names), self.resolution
        log.info("%s holds %d images", path, count)
        if self.sheets:
            log.info("sheets for people to look at (%s) are passed over: %d", ", ".join(SHEETS), self.sheets)
        if self.others:
            log.warning("files in %s that are no images are passed over: %s", path, said(self.others))
        resized = self.resized
        if resized:
            log.warning(
                "%d of %d images are not %d x %d and are resized and centre-cropped to it: %s. "
                "Values compare only with those of images that were made to this size in the same way.",
                *(resized.total(), count, side, side, said(resized)),
            )


def sheets_among(names: list[str]) -> list[str]:
    """Those of the names that are sheets of src/sample.py or src/evaluate.py, by the JSON file beside them."""
    paths = [PurePosixPath(name) for name in names]
    ours = {path.parent for path in paths if any(fnmatch(path.name, pattern) for pattern in OURS)}
    return [
        name
        for name, path in zip(names, paths, strict=True)
        if path.parent in ours and any(fnmatch(path.name, pattern) for pattern in SHEETS)
    ]


def look(source: Folder | Zip, name: str) -> tuple[tuple[int, int], int] | Exception:
    """Width and height by the image's header, and the CRC-32 of the file; or why it cannot be read."""
    try:
        content = source.read(name)
        with Image.open(io.BytesIO(content), formats=decoders()) as image:
            return image.size, zlib.crc32(content)
    except BROKEN as error:
        return error


def broken(source: Folder | Zip, failed: dict[str, Exception]) -> UserError:
    """Names the files."""
    named = ", ".join(f"{name} ({error})" for name, error in list(failed.items())[:NAMED])
    more = f" and {len(failed) - NAMED} more" if len(failed) > NAMED else ""
    return UserError(f"Images in {source.path} cannot be read: {named}{more}. Replace them or take them out.")


def said(counts: Counter[str]) -> str:
    """Such as "8 x 12 (6), 20 x 20 (1)"."""
    first = ", ".join(f"{what} ({count})" for what, count in counts.most_common(5))
    return first + (f" and {len(counts) - 5} other kinds" if len(counts) > 5 else "")

"""Generated images in numpy's files: ADM's .npz and what others write in their place."""

import hashlib
import logging
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.files.arrays import refuse_absurd

log = logging.getLogger(__name__)

# what numpy, zipfile and the file system raise for files that are damaged or something else
DAMAGED = (ValueError, KeyError, zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, MemoryError)
REMEDY = "Give a .npz or .npy whose images are uint8 with the shape (images, height, width, 3), as ADM's arr_0."


class ArrayImages:
    """Images of one array, uint8 (n, R, R, 3) or (n, 3, R, R); an image set for the metrics.

    Args:
        path: a .npz with the images as arr_0 (and perhaps their labels as arr_1) or as its only uint8 array of four
            dimensions, or a .npy with nothing else.

    Raises:
        UserError: the file is missing, damaged or holds something else.
    """

    def __init__(self, path: str | Path) -> None:
        name, array = read_array(Path(path))
        images = channels_first(array, f"{name} in {path}")
        if not len(images):
            raise UserError(f"{name} in {path} holds no images. {REMEDY}")
        if images.shape[2] != images.shape[3]:
            height, width = images.shape[2:]
            raise UserError(
                f"The images of {name} in {path} are {width} x {height}, and not square. "
                "Crop or resize them as the reference's are, and write them again."
            )
        self.images = torch.from_numpy(images)  # (n, 3, R, R)
        self.resolution = images.shape[2]
        self.fingerprint = hashlib.sha256(np.ascontiguousarray(images.transpose(0, 2, 3, 1))).hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, R, R); the labels are unknown, -1."""
        return self.images[indices].contiguous(), torch.full((len(indices),), -1)


def read_array(path: Path) -> tuple[str, np.ndarray]:
    """The array of images in a file and its name there; no pickle is executed.

    Raises:
        UserError: the file is missing, damaged, or does not say which of its arrays holds the images.
    """
    try:
        refuse_absurd(path)
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return "the array", content
        with content:
            return choose(content, path)
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}. Correct the path.") from error
    except DAMAGED as error:
        raise UserError(f"{path} cannot be read ({error}). {REMEDY}") from error


def choose(file: np.lib.npyio.NpzFile, path: Path) -> tuple[str, np.ndarray]:
    """arr_0, or the only array that can hold images.

    Raises:
        UserError: none can, or several.
    """
    if "arr_0" in file.files:
        return "arr_0", file["arr_0"]
    arrays = {name: file[name] for name in file.files}
    fitting = [name for name, array in arrays.items() if array.dtype == np.uint8 and array.ndim == 4]
    if len(fitting) != 1:
        found = ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items()) or "nothing"
        raise UserError(
            f"{path} has no arr_0, and {len(fitting)} arrays that can hold images (in it: {found}). {REMEDY}"
        )
    log.info("%s has no arr_0; its images are taken from %s", path, fitting[0])
    return fitting[0], arrays[fitting[0]]


def channels_first(array: np.ndarray, what: str) -> np.ndarray:
    """uint8 (n, 3, H, W), from that or from (n, H, W, 3).

    Raises:
        UserError: the array is neither of them, or may be both.
    """
    if array.dtype != np.uint8:
        raise UserError(
            f"{what} is {array.dtype} with the shape {array.shape}, and numbers other than uint8 do not say what is "
            f"white. {REMEDY}"
        )
    last, first = (array.ndim == 4 and array.shape[axis] == 3 for axis in (3, 1))
    if last and first:
        raise UserError(
            f"{what} has the shape {array.shape}, whose colours may be the second axis or the last. {REMEDY}"
        )
    if not (last or first):
        raise UserError(f"{what} is uint8 with the shape {array.shape}, which are no RGB images. {REMEDY}")
    return array if first else array.transpose(0, 3, 1, 2)

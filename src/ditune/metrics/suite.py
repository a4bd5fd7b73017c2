"""All metrics of generated images against a reference dataset; features of the reference are cached on disk."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ditune.distributed import world_size
from ditune.errors import UserError
from ditune.files.atomic import atomic
from ditune.files.locks import locked, share
from ditune.metrics.distances import frechet_distance, kid_with_deviation, self_test
from ditune.metrics.features import BATCHES, Extractor, ImageSet, Part, extract
from ditune.metrics.manifold import density_coverage, precision_recall
from ditune.metrics.nearest import nearest
from ditune.progress import meter

log = logging.getLogger(__name__)

CACHE_VERSION = 1
LEAST, LEAST_REFERENCE = 4, 6  # images: KID's error needs halves of two; density needs a fifth neighbour


def check_counts(images: int, reference: int) -> None:
    """Refuse sets that are too small for the metrics, before anything is computed.

    Args:
        images: number of generated images.
        reference: number of reference images.

    Raises:
        UserError: there are too few.
    """
    if images < LEAST:
        raise UserError(f"The metrics need at least {LEAST} images, and here are {images}. Give or generate more.")
    if reference < LEAST_REFERENCE:
        raise UserError(
            f"The metrics need at least {LEAST_REFERENCE} images of the reference, and it has {reference}. "
            "Choose a larger data set or split as metrics.reference."
        )


class MetricSuite:
    """KID, Frechet distance, precision, recall, density and coverage in the features of one extractor.

    The metrics' names carry the extractor's name. Computation runs on the extractor's device.

    Args:
        extractor: makes features of images.
        cache: folder for the features of references; None = they are computed every time.
        batch_size: images per batch.
        reference_split: "all" or "train", where the caller takes that part of the reference's dataset; a part of the
            header of cached features, and "train" of the metrics' names. None = neither.

    Raises:
        RuntimeError: the machine's linear algebra gives wrong results.
    """

    def __init__(
        self,
        extractor: Extractor,
        cache: str | Path | None = None,
        batch_size: int = 64,
        reference_split: str | None = None,
    ) -> None:
        self_test()
        self.extractor, self.reference_split = extractor, reference_split
        self.cache = None if cache is None else Path(cache)
        self.batch_size = batch_size

    @property
    def identity(self) -> dict[str, str | int]:
        """Everything that changes the values, except the images and the reference."""
        return dict(self.extractor.identity) | self._split

    @property
    def name(self) -> str:
        """In the names of the metrics: the extractor's, and the split of the reference where it is not as usual."""
        return f"{self.extractor.name}_train" if self.reference_split == "train" else self.extractor.name

    @property
    def _split(self) -> dict[str, str]:
        return {} if self.reference_split is None else {"reference_split": self.reference_split}

    def __call__(self, images: Tensor | ImageSet, reference: ImageSet) -> dict[str, float | int]:
        """Metrics of images against a reference dataset; see `compare`.

        Args:
            images: uint8 (N, 3, H, W), or a dataset.
            reference: the dataset to compare with.
        """
        return self.compare(self.features(images), self.reference(reference))

    def compare(self, x: Tensor, y: Tensor) -> dict[str, float | int]:
        """Metrics of the extractor's outputs.

        All but KID, which is unbiased, are comparable only at equal n and n_reference.

        Args:
            x: (N, D) for generated images.
            y: (M, D) for the reference.

        Returns:
            KID over all images with its standard error; the Frechet distance; precision, recall, density and coverage;
            the counts; the mean and the least cosine distance to the nearest reference (near zero: copies).

        Raises:
            UserError: there are fewer than four images, or fewer than six in the reference.
        """
        x, y = (output[:, self.extractor.columns["features"]] for output in (x, y))
        with meter("comparing features", 5, "metrics") as progress:
            value, deviation = kid_with_deviation(x, y)
            progress.advance()
            precision, recall = precision_recall(x, y)
            progress.advance()
            density, coverage = density_coverage(x, y)
            progress.advance()
            distance, _ = nearest(x, y)
            progress.advance()
            frechet = frechet_distance(x, y)
            progress.advance()
        name = self.name
        return {
            f"kid_{name}": value,
            f"kid_{name}_std": deviation,
            f"fd_{name}": frechet,
            f"precision_{name}": precision,
            f"recall_{name}": recall,
            f"density_{name}": density,
            f"coverage_{name}": coverage,
            "n": len(x),
            "n_reference": len(y),
            "nearest_mean": distance.mean().item(),
            "nearest_min": distance.min().item(),
        }

    def features(self, images: Tensor | ImageSet, advance: Callable[[int], None] | None = None) -> Tensor:
        """Outputs (N, D) of the extractor for uint8 images (N, 3, H, W) or a dataset, computed anew; see `extract`."""
        return extract(self.extractor, images, self.batch_size, advance)

    def neighbours(self, images: Tensor, reference: ImageSet, k: int = 4) -> tuple[Tensor, Tensor]:
        """Cosine distances and indices (N, k) of the k nearest reference images of uint8 images (N, 3, H, W)."""
        return self.nearest(self.features(images), self.reference(reference), k)

    def nearest(self, x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Cosine distances and indices (N, k) of the k nearest rows of y (M, D) for each row of x (N, D)."""
        columns = self.extractor.columns["features"]
        return nearest(x[:, columns], y[:, columns], k)

    def reference(self, images: ImageSet) -> Tensor:
        """Outputs (M, D) of the extractor for a reference dataset, from the cache if they are there.

        Raises:
            UserError: the cached file is damaged, or was made from other images or by another extractor.
        """
        if self.cache is None:
            return self.features(images)
        header = {
            "format": "ditune features",
            "version": CACHE_VERSION,
            "data": images.fingerprint,
            "n": len(images),
            **self.extractor.identity,
            **self._split,
        }
        key = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]
        path = self.cache / f"{self.extractor.name}-{key}.safetensors"
        if path.exists():
            return read_features(path, header)
        log.info("Features of %d reference images are computed once, into %s.", len(images), path)
        if world_size() > 1:
            self._share(images, path, header)
            return read_features(path, header)
        features = self.features(images)
        write_features(path, features, header)
        return features

    def _share(self, images: ImageSet, path: Path, header: dict[str, str | int]) -> None:
        """Write the features of a dataset together with the other processes, in whole batches as one process does."""
        folder, size = path.with_name(f".{path.stem}"), BATCHES * self.batch_size
        count = -(-len(images) // size)

        def file(i: int) -> Path:
            return folder / f"{i:06d}.npy"

        def work(i: int) -> None:
            part = Part(images, range(i * size, min((i + 1) * size, len(images))))
            with atomic(file(i)) as temporary, temporary.open("wb") as stream:
                np.save(stream, self.features(part, progress.advance).numpy())

        with meter("extracting features of the reference", len(images)) as progress:
            share(folder, count, work, path.exists)
        with locked(self.cache / ".lock"):
            if not path.exists():
                parts = [torch.from_numpy(np.load(file(i), allow_pickle=False)) for i in range(count)]
                write_features(path, torch.cat(parts), header)
            shutil.rmtree(folder, ignore_errors=True)  # a late process may have made it again


def content_hash(features: Tensor) -> str:
    """SHA-256 (hex) of the values; safetensors itself would not notice a flipped bit."""
    return hashlib.sha256(features.contiguous().numpy()).hexdigest()


def read_features(path: Path, header: dict[str, str | int]) -> Tensor:
    """Read features that `write_features` has written.

    Args:
        path: the file.
        header: what the file must say about itself.

    Returns:
        (M, D) float32.

    Raises:
        UserError: the file is damaged or has another header.
    """
    remedy = "Delete the file; it is computed again."
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("header", "{}"))
            features = file.get_tensor("features") if "features" in file.keys() else None  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"The cached features {path} cannot be read ({error}). {remedy}") from error
    different = sorted(key for key, value in header.items() if found.get(key) != value)
    if features is None or different:
        raise UserError(f"The cached features {path} are not the expected ones ({', '.join(different)}). {remedy}")
    if found.get("content") != content_hash(features):
        raise UserError(f"The cached features {path} are damaged. {remedy}")
    return features


def write_features(path: Path, features: Tensor, header: dict[str, str | int]) -> None:
    """Write features (M, D) with a header; processes that write the same file at once do no harm.

    Raises:
        OSError: the file cannot be written.
    """
    metadata = {"header": json.dumps({**header, "content": content_hash(features)})}
    with atomic(path) as temporary:
        temporary.write_bytes(save({"features": features.contiguous()}, metadata))


Judge = MetricSuite  # its name in the configs of runs

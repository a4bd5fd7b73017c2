"""Generated pictures against a reference data set: one dictionary of numbers, the reference's features kept on disk."""

import hashlib
import json
import logging
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ditune.errors import UserError
from ditune.metrics.distances import frechet_distance, kid_with_deviation, self_test
from ditune.metrics.features import Extractor, PictureSet, extract
from ditune.metrics.manifold import density_coverage, precision_recall
from ditune.metrics.nearest import nearest
from ditune.progress import meter

log = logging.getLogger(__name__)

CACHE_VERSION = 1
LEAST, LEAST_REFERENCE = 4, 6  # images: KID's error is of halves of two; a ball of density reaches to the fifth other


def check_counts(images: int, reference: int) -> None:
    """Whether there is enough to compare, before anything is computed.

    Raises:
        UserError: there is not.
    """
    if images < LEAST:
        raise UserError(f"The metrics need at least {LEAST} images, and here are {images}. Give or generate more.")
    if reference < LEAST_REFERENCE:
        raise UserError(
            f"The metrics need at least {LEAST_REFERENCE} images of the reference, and it has {reference}. "
            "Choose a larger data set or split as metrics.reference."
        )


class Judge:
    """Computes the distances of uint8 pictures to a reference; their names carry the extractor's.

    `cache` is a folder for the references' features (None: they are computed each time). The device is the
    extractor's. Raises RuntimeError at once where the machine's linear algebra is broken.
    """

    def __init__(self, extractor: Extractor, cache: str | Path | None = None, batch_size: int = 64) -> None:
        self_test()
        self.extractor = extractor
        self.cache = None if cache is None else Path(cache)
        self.batch_size = batch_size

    @property
    def identity(self) -> dict[str, str | int]:
        """Everything that changes the values, but the pictures and the reference."""
        return dict(self.extractor.identity)

    def __call__(self, pictures: Tensor | PictureSet, reference: PictureSet) -> dict[str, float | int]:
        """Distances of pictures to a reference; see `compare`."""
        return self.compare(self.features(pictures), self.reference(reference))

    def compare(self, x: Tensor, y: Tensor) -> dict[str, float | int]:
        """Distances of an extractor's output x (N, D) for pictures to the reference's y (M, D).

        KID with its standard error (over all pictures, unbiased); the Frechet distance; precision, recall, density
        and coverage. All but KID are comparable only at equal n and n_reference. Then the mean and the least cosine
        distance to the nearest reference: near zero, pictures are copies.
        Raises UserError for fewer than four pictures, and for fewer than six of the reference.
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
        name = self.extractor.name
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

    def features(self, pictures: Tensor | PictureSet) -> Tensor:
        """Features (N, D) of uint8 pictures (N, 3, H, W) or of a data set, computed anew."""
        return extract(self.extractor, pictures, self.batch_size)

    def neighbours(self, pictures: Tensor, reference: PictureSet, k: int = 4) -> tuple[Tensor, Tensor]:
        """Cosine distance and index (N, k) of the k nearest reference pictures."""
        return self.nearest(self.features(pictures), self.reference(reference), k)

    def nearest(self, x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The same for the extractor's output x (N, D) and y (M, D)."""
        columns = self.extractor.columns["features"]
        return nearest(x[:, columns], y[:, columns], k)

    def reference(self, pictures: PictureSet) -> Tensor:
        """Features (M, D) of the reference, from the cache where they are there.

        Raises UserError when the cached file is broken or was made from other pictures or by another extractor.
        """
        if self.cache is None:
            return self.features(pictures)
        header = {
            "format": "ditune features",
            "version": CACHE_VERSION,
            "data": pictures.fingerprint,
            "n": len(pictures),
            **self.extractor.identity,
        }
        key = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]
        path = self.cache / f"{self.extractor.name}-{key}.safetensors"
        if path.exists():
            return read_features(path, header)
        log.info("Features of %d reference pictures are computed once, into %s.", len(pictures), path)
        features = self.features(pictures)
        write_features(path, features, header)
        return features


def content_hash(features: Tensor) -> str:
    """SHA-256 (hex) of the values: a flipped bit in a safetensors file is not noticed otherwise."""
    return hashlib.sha256(features.contiguous().numpy()).hexdigest()


def read_features(path: Path, header: dict[str, str | int]) -> Tensor:
    """Features (M, D) of a file by `write_features`. Raises UserError when it is broken or has another header."""
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
    """Writes beside the target and renames, so a stopped process leaves no half file and two at once do no harm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"header": json.dumps({**header, "content": content_hash(features)})}
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(save({"features": features.contiguous()}, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

"""How far generated pictures are from real ones: features, KID, Frechet distance, nearest neighbours."""

from ditune.metrics.distances import frechet_distance, kid, kid_with_deviation, self_test
from ditune.metrics.features import EfficientNetLite0, PictureSet, extract
from ditune.metrics.judge import Judge
from ditune.metrics.nearest import nearest, nearest_pixels

__all__ = [
    "EfficientNetLite0",
    "Judge",
    "PictureSet",
    "extract",
    "frechet_distance",
    "kid",
    "kid_with_deviation",
    "nearest",
    "nearest_pixels",
    "self_test",
]

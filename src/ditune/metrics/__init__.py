"""Metrics of generated images against real ones: features, KID, Frechet distance, precision, nearest neighbours."""

from ditune.metrics.dinov2 import DINOv2
from ditune.metrics.distances import (
    frechet_distance,
    frechet_from_statistics,
    kid,
    kid_with_deviation,
    self_test,
    statistics,
)
from ditune.metrics.features import EfficientNetLite0, Extractor, ImageSet, PictureSet, extract
from ditune.metrics.inception import Inception2015, InceptionJudge, InceptionMetrics, inception_score
from ditune.metrics.manifold import density_coverage, precision_recall
from ditune.metrics.nearest import nearest, nearest_pixels
from ditune.metrics.suite import Judge, MetricSuite, check_counts

__all__ = [
    "DINOv2",
    "EfficientNetLite0",
    "Extractor",
    "ImageSet",
    "Inception2015",
    "InceptionJudge",
    "InceptionMetrics",
    "Judge",
    "MetricSuite",
    "PictureSet",
    "check_counts",
    "density_coverage",
    "extract",
    "frechet_distance",
    "frechet_from_statistics",
    "inception_score",
    "kid",
    "kid_with_deviation",
    "nearest",
    "nearest_pixels",
    "precision_recall",
    "self_test",
    "statistics",
]

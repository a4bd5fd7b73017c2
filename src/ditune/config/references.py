"""The reference images of a config's metrics."""

from omegaconf import DictConfig

from ditune.config.instantiate import instantiate
from ditune.data import ImageDataset


def reference_images(cfg: DictConfig) -> ImageDataset:
    """The dataset `metrics.reference`; where `metrics.reference_split` is set, all images of it or its train split.

    Raises:
        UserError: the images are missing, or a key is wrong.
    """
    split = cfg.metrics.get("reference_split")
    given = {} if split is None else {"split": None if split == "all" else split}
    return instantiate(cfg.metrics.reference, "metrics", **given)

"""Several loggers of one training."""

from collections.abc import Sequence

from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger

from ditune.errors import require


def several(use: Sequence[str], **configs: DictConfig) -> list[Logger]:
    """The loggers of `use`; the others are not built.

    Args:
        use: names of loggers, each once.
        configs: of all loggers, by name.

    Raises:
        UserError: a name is unknown or stands twice, or there is none.
    """
    names = list(use)
    valid = 0 < len(names) == len(set(names)) and set(names) <= configs.keys()
    require(valid, "logger.use", names, f"Set it to some of {', '.join(configs)}, each once.")
    return [instantiate(configs[name]) for name in names]

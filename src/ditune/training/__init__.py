"""From a config to a run folder: the LightningModule, its callbacks, EMA, checkpoints and resuming."""

from .balance import Balance
from .ema import Ema
from .fit import train
from .module import GenerativeModule

__all__ = ["Balance", "Ema", "GenerativeModule", "train"]

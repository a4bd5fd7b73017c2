"""From a config to a run folder: the LightningModule, its callbacks, EMA, checkpoints and resuming."""

from ditune.moe.balance import Balance
from ditune.training.ema import Ema
from ditune.training.fit import train
from ditune.training.module import GenerativeModule

__all__ = ["Balance", "Ema", "GenerativeModule", "train"]

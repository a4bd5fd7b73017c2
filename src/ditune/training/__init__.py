"""From the objects of a run to its weights: the LightningModule, its callbacks, EMA, checkpoints and resuming."""

from ditune.moe.balance import Balance
from ditune.training.ema import Ema
from ditune.training.module import GenerativeModule

__all__ = ["Balance", "Ema", "GenerativeModule"]  # Balance: configs of runs name it here

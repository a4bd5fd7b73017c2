"""Where the numbers of a training go."""

from ditune.training.loggers.metrics_csv import MetricsCsv
from ditune.training.loggers.wandb import WandbRun

__all__ = ["MetricsCsv", "WandbRun"]

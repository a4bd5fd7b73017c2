"""The earlier place of MetricsCsv, which configs of runs name."""

from ditune.training.loggers.metrics_csv import MetricsCsv

__all__ = ["MetricsCsv"]

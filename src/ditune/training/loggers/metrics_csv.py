"""metrics.csv: one line per logged step. A resumed run keeps the lines up to the step that it goes on from."""

import csv
import math
import time
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only

from ditune.files.atomic import atomic, set_aside
from ditune.files.spared import spared
from ditune.progress import is_first_rank

LONGEST = 1.0  # seconds that a line waits for the next ones before the file is written


class MetricsCsv(Logger):
    """Logger of scalars to `folder`/metrics.csv, always on; the file is whole at every moment.

    Args:
        folder: the run's folder.
        flush_every: lines between two writings; those of a slow training are written after a second.
    """

    def __init__(self, folder: str | Path, flush_every: int = 20):
        super().__init__()
        self.path, self.flush_every = Path(folder) / "metrics.csv", flush_every
        self._rows: dict[int, dict[str, float]] = {}
        self._unwritten, self._written_at = 0, -math.inf

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> "MetricsCsv":
        return self

    def keep_until(self, step: int) -> None:
        """Read the lines of an earlier start of the run, up to the checkpoint's step; a damaged file is set aside."""
        if not self.path.is_file() or not is_first_rank():
            return
        try:
            self._rows = {row["step"]: row for row in self._lines() if row["step"] <= step}
        except (ValueError, KeyError, TypeError, OverflowError, csv.Error) as error:
            set_aside(self.path, str(error))

    def _lines(self) -> list[dict[str, float]]:
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        return [row | {"step": int(row["step"])} for row in rows]

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        values = {key: float(value) for key, value in metrics.items() if key != "epoch"}
        self._rows.setdefault(step or 0, {"step": step or 0}).update(values)
        self._unwritten += 1

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The run's config.yaml holds them."""

    @rank_zero_only
    def save(self) -> None:
        """Write the file if it is time to; Lightning calls it at every line, and a writing is synchronised."""
        if self._unwritten >= self.flush_every or time.monotonic() - self._written_at >= LONGEST:
            self.write()

    @rank_zero_only
    def write(self) -> None:
        """Write the file."""
        columns = list(dict.fromkeys(key for row in self._rows.values() for key in row))
        with spared("metrics.csv"), atomic(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self._rows[step] for step in sorted(self._rows))
        self._unwritten, self._written_at = 0, time.monotonic()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._rows:
            self.write()

"""What the runs below a folder have left, as rows: one for each method, data set and setting, averaged over seeds."""

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ditune.errors import UserError
from ditune.files.atomic import read_json
from ditune.metrics.names import first_headline, is_compared, lower_is_better

PRECISION = "trainer.precision"  # as it was resolved
# keys of a config that a table shows in columns of their own, or that say nothing about the result
SHOWN_APART = ("seed", "max_steps", "optimizer.lr", "peft.lr", "run_dir", "sweep_dir", "paths.", "logger.", "name")
SHOWN_APART += ("launcher.", "tags", "resume", "dry_run", "traceback", "verbose")


@dataclass(frozen=True)
class Run:
    """One result.json and its folder."""

    folder: Path
    result: dict[str, Any]

    @property
    def finished(self) -> bool:
        return self.result.get("status") == "finished"

    @property
    def data(self) -> str:
        return self.result["data"]["name"]

    @property
    def method(self) -> str:
        return self.result["method"]

    @cached_property
    def config(self) -> dict[str, Any]:
        """Dotted keys and values of config.yaml; nothing where the file is missing."""
        path = self.folder / "config.yaml"
        return dict(_flat(yaml.safe_load(path.read_text(encoding="utf-8")))) if path.is_file() else {}

    @cached_property
    def values(self) -> dict[str, float]:
        """Numbers by name; metrics of the trained network under their own names, of the base as `<name> before`."""
        result = self.result
        metrics = result.get("metrics", {})
        before = {f"{name} before": value for name, value in metrics.get("before", {}).items()}
        loss = {"test_loss": "after", "test_loss before": "before"}
        denoising = result.get("denoising", {})
        values = {
            "parameters": result["parameters"]["trainable"],
            "share": result["parameters"]["share"],
            **{name: denoising[key] for name, key in loss.items() if key in denoising},
            **metrics.get("after", {}),
            **result.get("routing", {}),
            **before,
        }
        for other in result.get("other_protocols", {}).values():
            values |= {name: value for name, value in other["after"].items() if name not in values}
        for name in ("images_per_second", "seconds_per_step", "adapter_bytes", "peak_memory_mib"):
            values[name] = result.get(name)
        values["seconds"] = result.get("seconds", {}).get("fit")
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class Row:
    """Runs that differ in their seed only."""

    method: str
    data: str
    lr: float
    max_steps: int
    settings: str  # what else the sweep varied
    runs: list[Run] = field(default_factory=list)

    @property
    def label(self) -> str:
        return f"{self.method} ({self.settings})" if self.settings else self.method

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.finished]

    def mean(self, name: str) -> float | None:
        """Over the seeds that have finished; None where none has, or none has this number."""
        values = self._values(name)
        return statistics.fmean(values) if values else None

    def deviation(self, name: str) -> float | None:
        """Sample deviation over the seeds; None of fewer than two."""
        values = self._values(name)
        return statistics.stdev(values) if len(values) > 1 else None

    def _values(self, name: str) -> list[float]:
        return [run.values[name] for run in self.finished if name in run.values]


def read_results(folder: str | Path) -> list[Run]:
    """Every run below `folder`, sorted by path.

    Raises:
        UserError: there is none.
    """
    paths = sorted(Path(folder).rglob("result.json"), key=lambda path: _natural(str(path)))
    runs = [Run(path.parent, read_json(path)) for path in paths]
    runs = [run for run in runs if {"method", "data", "parameters"} <= run.result.keys()]
    if not runs:
        raise UserError(f"There is no result.json of a training below {folder}. Give the folder of a sweep, or a run.")
    return runs


def rows(runs: Sequence[Run]) -> list[Row]:
    """In the order of the first run of each."""
    groups: dict[str, Row] = {}
    keys = varied(runs)
    for run in runs:
        result = run.result
        settings = " ".join(f"{key}={run.config[key]}" for key in keys if key in run.config)
        row = Row(run.method, run.data, result["lr"], result["max_steps"], settings)
        name = json.dumps([row.method, row.data, row.lr, row.max_steps, result["peft"], settings])
        groups.setdefault(name, row).runs.append(run)
    return list(groups.values())


def varied(runs: Sequence[Run]) -> list[str]:
    """Keys of the config that differ between runs of one method on one data set; the precision also between others.

    Numbers of bf16-mixed and 32-true are not the same protocol: where both are there, every row says which it has.
    """
    values: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for run in runs:
        for key, value in run.config.items():
            if key == PRECISION:
                values["", "", key].add(repr(value))
            elif not key.startswith(SHOWN_APART):
                values[run.method, run.data, key].add(repr(value))
    return list(dict.fromkeys(key for (_, _, key), found in values.items() if len(found) > 1))


def best(table: Iterable[Row], name: str) -> dict[str, float]:
    """The best mean of each data set; nothing for numbers at which none can be best."""
    means: dict[str, list[float]] = defaultdict(list)
    for row in table:
        if (mean := row.mean(name)) is not None and is_compared(name):
            means[row.data].append(mean)
    choose = min if lower_is_better(name) else max
    return {data: choose(values) for data, values in means.items() if len(values) > 1}


def main_metric(runs: Iterable[Run]) -> str | None:
    """FID where there is one, else KID, else another distance, else the test loss."""
    return first_headline(list(dict.fromkeys(name for run in runs for name in run.values)))


def _flat(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _natural(text: str) -> list[Any]:
    """A sorting key by which 10 comes after 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]

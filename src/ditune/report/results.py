"""Results of the runs below a folder, and rows of them: one per method, dataset and setting, averaged over seeds."""

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

from ditune.config.roles import NOTHING, changes_no_result, role_of
from ditune.errors import UserError
from ditune.files.atomic import read_json
from ditune.metrics.names import first_headline, is_compared, lower_is_better
from ditune.report.status import status_of

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where there is one: a table has 56 long files
PRECISION = "trainer.precision"  # resolved
# keys of a config that a table shows in columns of their own, or that say nothing about the result
SHOWN_APART = ("seed", "max_steps", "optimizer.lr", "peft.lr", "name")


@dataclass(frozen=True)
class Run:
    """A training that has left a result.json.

    Args:
        folder: the run folder.
        result: content of its result.json.
    """

    folder: Path
    result: dict[str, Any]

    @property
    def finished(self) -> bool:
        """Whether the training and its evaluation are done."""
        return self.result.get("status") == "finished"

    @cached_property
    def status(self) -> tuple[str, str]:
        """Status and the reason for it, as `status_of` reads them."""
        return status_of(self.folder, self.result)

    @property
    def data(self) -> str:
        """Name of the dataset."""
        return self.result["data"]["name"]

    @property
    def method(self) -> str:
        """Title of the PEFT method."""
        return self.result["method"]

    @cached_property
    def config(self) -> dict[str, Any]:
        """Dotted keys and values of config.yaml; if the file is missing, those that result.json has."""
        path = self.folder / "config.yaml"
        if path.is_file():
            return dict(_flat(_read_config(path)))
        result, protocol = self.result, self.result.get("metrics", {}).get("protocol", {})
        known = {
            "batch_size": result.get("batch_size"),
            PRECISION: result.get("precision"),
            "metrics.n": protocol.get("n"),
            "sampler.steps": protocol.get("steps"),
            "sampler.guidance": protocol.get("guidance"),
        }
        return dict(_flat({"peft": result.get("peft", {})})) | {k: v for k, v in known.items() if v is not None}

    def protocol(self, name: str) -> dict[str, Any]:
        """How a metric was measured; {} if it was not.

        Args:
            name: of the metric.
        """
        metrics = self.result.get("metrics", {})
        if name in metrics.get("after", {}):
            return metrics.get("protocol", {})
        others = self.result.get("other_protocols", {}).values()
        return next((other.get("protocol", {}) for other in others if name in other["after"]), {})

    @cached_property
    def values(self) -> dict[str, float]:
        """Numbers by name; metrics of the trained network have their own names, those of the base `<name> before`."""
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
    """Runs that differ only in their seed.

    Args:
        method: title of the PEFT method.
        data: name of the dataset.
        lr: learning rate.
        max_steps: steps of the training.
        settings: other keys that the sweep varied, with their values.
        runs: the runs.
    """

    method: str
    data: str
    lr: float
    max_steps: int
    settings: str
    runs: list[Run] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The method, with the settings if there are any."""
        return f"{self.method} ({self.settings})" if self.settings else self.method

    @property
    def finished(self) -> list[Run]:
        """The runs that have finished."""
        return [run for run in self.runs if run.finished]

    def mean(self, name: str) -> float | None:
        """Mean of a number over the finished runs; None if none has it."""
        values = self._values(name)
        return statistics.fmean(values) if values else None

    def deviation(self, name: str) -> float | None:
        """Sample standard deviation of a number over the finished runs; None of fewer than two."""
        values = self._values(name)
        return statistics.stdev(values) if len(values) > 1 else None

    def _values(self, name: str) -> list[float]:
        return [run.values[name] for run in self.finished if name in run.values]


def read_results(folder: str | Path) -> list[Run]:
    """All runs below a folder, sorted by path.

    Args:
        folder: a sweep, or a run.

    Raises:
        UserError: there are none.
    """
    runs = find_results(folder)
    if not runs:
        raise UserError(f"There is no result.json of a training below {folder}. Give the folder of a sweep, or a run.")
    return runs


def find_results(folder: str | Path) -> list[Run]:
    """As `read_results`; [] if there are none."""
    paths = sorted(Path(folder).rglob("result.json"), key=lambda path: _natural(str(path)))
    runs = [Run(path.parent, read_json(path)) for path in paths]
    return [run for run in runs if {"method", "data", "parameters"} <= run.result.keys()]


def rows(runs: Sequence[Run]) -> list[Row]:
    """Rows of runs, in the order of the first run of each."""
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
    """Keys of the config that differ between runs of one method on one dataset; the precision also between others.

    Metrics under bf16-mixed and 32-true are not comparable: if both occur, every row says which it has.
    """
    values: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    for run in runs:
        for key, value in run.config.items():
            if key == PRECISION:
                values["", "", key].add(repr(value))
                continue
            silent = key.startswith(SHOWN_APART) or changes_no_result(key)
            if not silent and role_of(key.partition(".")[0]) is not NOTHING:
                values[run.method, run.data, key].add(repr(value))
    return list(dict.fromkeys(key for (_, _, key), found in values.items() if len(found) > 1))


def best(table: Iterable[Row], name: str) -> dict[str, float]:
    """The best mean on each dataset; {} for numbers that are not compared.

    Args:
        table: rows to compare.
        name: of the number.
    """
    means: dict[str, list[float]] = defaultdict(list)
    for row in table:
        if (mean := row.mean(name)) is not None and is_compared(name):
            means[row.data].append(mean)
    choose = min if lower_is_better(name) else max
    return {data: choose(values) for data, values in means.items() if len(values) > 1}


def clear_best(table: Iterable[Row], name: str) -> dict[str, Row]:
    """The best row on each dataset, where the seeds allow to say so; {} for numbers that are not compared.

    They do if every row has two or more, and the best row's mean ± deviation overlaps no other's.

    Args:
        table: rows to compare.
        name: of the number.
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in table:
        if row.mean(name) is not None and is_compared(name):
            groups[row.data].append(row)
    found = {}
    for data, own in groups.items():
        place = clearly_best([(row.mean(name), row.deviation(name)) for row in own], lower_is_better(name))
        if place is not None:
            found[data] = own[place]
    return found


def clearly_best(values: Sequence[tuple[float, float | None]], lower: bool) -> int | None:
    """Place of the best (mean, deviation) whose interval overlaps no other's; None if there is none.

    Args:
        values: means and deviations; a deviation of None = one seed, which allows no comparison.
        lower: whether less is better.
    """
    if len(values) < 2 or any(deviation is None for _, deviation in values):
        return None
    sign = 1 if lower else -1
    order = sorted(range(len(values)), key=lambda k: sign * values[k][0])
    mean, deviation = values[order[0]]
    others = (sign * values[k][0] - values[k][1] for k in order[1:])
    return order[0] if all(sign * mean + deviation < other for other in others) else None


def main_metric(runs: Iterable[Run]) -> str | None:
    """The metric that stands for a report: FID if there is one, else KID, else another distance, else the test loss."""
    return first_headline(list(dict.fromkeys(name for run in runs for name in run.values)))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"The config {path} is damaged ({reason}). Copy it again, or delete it.") from error
    if not isinstance(values, dict):
        raise UserError(f"The config {path} is damaged: it holds no keys. Copy it again, or delete it.")
    return values


def _flat(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _natural(text: str) -> list[Any]:
    """A sorting key by which 10 comes after 2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]

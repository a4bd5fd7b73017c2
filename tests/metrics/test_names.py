"""The table of metrics: one row makes a metric compared, minimised or maximised, and shown; suites use its names."""

import ast
import json
from pathlib import Path

import pytest
import torch

from ditune.metrics import MetricSuite, names
from ditune.metrics.names import (
    METRICS,
    Metric,
    family,
    first_headline,
    headline,
    is_compared,
    lower_is_better,
)
from ditune.report.results import best, read_results, rows
from ditune.report.tables import markdown_table

COUNTS = {"n", "n_reference"}


def write_run(folder: Path, method: str, metrics: dict[str, float], seed: int) -> None:
    """The result.json of a finished training, as far as tables need it."""
    folder.mkdir()
    result = {
        "status": "finished",
        "method": method,
        "peft": {"name": method},
        "data": {"name": "a"},
        "parameters": {"trainable": 1, "share": 0.5},
        "lr": 1e-3,
        "max_steps": 1,
        "seed": seed,
        "metrics": {"after": metrics},
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


class Tiny(torch.nn.Module):
    name, columns, identity = "tiny", {"features": slice(None)}, {"extractor": "tiny"}


def test_every_name_of_a_suite_has_a_row():
    x, y = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    values = MetricSuite(Tiny()).compare(x, y)
    assert {name for name in values if family(name) is None} == COUNTS
    assert [name for name in values if headline(name)] == ["kid_tiny", "fd_tiny"]
    assert not any(is_compared(name) for name in ("nearest_mean", "kid_tiny_std", "kid_tiny before", *COUNTS))


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_name_belongs_to_one_family(metric):
    assert [other for other in METRICS if other.includes(f"{metric.name}_x")] == [metric]
    assert lower_is_better(f"{metric.name}_x") != metric.higher_is_better


def test_the_first_headline_stands_for_a_report():
    assert first_headline(["test_loss", "fd_x", "kid_x_std", "kid_x", "sfid_10k"]) == "kid_x"
    assert first_headline(["kid_x", "fid_10k"]) == "fid_10k"
    assert first_headline(["precision_x", "kid_x before"]) is None


@pytest.mark.parametrize("higher", [False, True])
def test_a_new_row_is_all_that_a_metric_needs(tmp_path, monkeypatch, higher):
    monkeypatch.setattr(names, "METRICS", (Metric("cmmd", higher, headline=True), *METRICS))
    for method, value in (("DiffFit", 0.25), ("BitFit", 0.75)):
        for seed in (0, 1):
            write_run(tmp_path / f"{method}_{seed}", method, {"cmmd_x": value}, seed)
    runs = read_results(tmp_path)
    assert best(rows(runs), "cmmd_x") == {"a": 0.75 if higher else 0.25}
    assert first_headline(["fid_10k", "cmmd_x"]) == "cmmd_x"
    assert lower_is_better("cmmd_x") != higher
    assert f"**{0.75 if higher else 0.25:.4f}**" in markdown_table(runs)


def test_the_table_imports_nothing_heavy():
    tree = ast.parse(Path(names.__file__).read_text(encoding="utf-8"))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in found] == ["from dataclasses import dataclass"]

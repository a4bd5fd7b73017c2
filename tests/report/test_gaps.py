"""Gaps between domains, what closes of them, and paired differences that rank nothing inside of their interval."""

import json
import math
import statistics

import pytest

from ditune.report.gap_plots import learned_and_forgotten
from ditune.report.gap_tables import MEASURED, drift_table, gaps_markdown, kid_difference, loss_difference
from ditune.report.gaps import gaps
from ditune.report.intervals import paired, stratified, t_quantile
from ditune.report.results import find_results, read_results
from ditune.report.write import write_report
from helpers import ROOT
from run_results import write_run

REAL = ROOT / "docs" / "results" / "emoji_table"
NAMES = {"DiffFit": "difffit", "Full": "full", "BitFit": "bitfit"}
LOSSES = [1.0, 1.2, 0.8, 1.1]


def write(folder, method, data, after, before=0.5, own=0.1, error=0.01, seed=0, losses=None, **more):
    """A finished run whose KID is `after`; images of its losses beside it."""
    values = {"kid_x": after, "kid_x_std": error, "n": 8}
    metrics = {
        "protocol": {"n": 8},
        "before": {"kid_x": before, "kid_x_std": error},
        "after": values,
        "base_domain": {"kid_x": own, "kid_x_std": 0.0},
    }
    write_run(folder, method, seed, data, changed={"metrics": metrics, "method": NAMES[method]})
    if losses is not None:
        (folder / MEASURED).write_text(json.dumps({"losses": losses} | more))


def test_real_results_close_what_their_runs_say():
    runs = read_results(REAL)
    found = gaps(runs)
    assert found.counted == ["emoji_fluent3d"]
    for method in found.methods:
        said = statistics.fmean(run.result["metrics"]["gap_closed"] for run in method.runs)
        assert found.share(method, "emoji_fluent3d") == pytest.approx(said)
        assert found.overall(method) == (pytest.approx(said), ["emoji_fluent3d"])
    assert found.full.rank == 1
    assert found.of_full(found.full, found.counted) == 1
    text = gaps_markdown(runs)
    assert f"| full | {100 * found.share(found.full, 'emoji_fluent3d'):.0f} % | 1.00 | 1 of 1 | 1.00 | 6.17 M |" in text
    assert "Drift" not in text  # nothing measured it


def test_sums_ranks_and_gaps_that_do_not_count(tmp_path):
    for data, own, before in (("far", 0.1, 0.5), ("other", 0.1, 0.3), ("near", 0.1, 0.12)):
        for method, closes in (("Full", 0.5), ("DiffFit", 0.25)):
            write(tmp_path / f"{method}_{data}", method, data, before - closes * (before - own), before, own)
    found = gaps(find_results(tmp_path))
    assert found.counted == found.common == ["far", "other"]  # 0.02 is less than three times 0.01
    full, difffit = found.full, next(m for m in found.methods if m.name == "difffit")
    assert found.overall(full)[0] == pytest.approx((0.2 + 0.1) / (0.4 + 0.2))
    assert found.of_full(difffit, found.counted) == pytest.approx(0.5)
    assert found.share(difffit, "near") == pytest.approx(0.25)
    assert (full.rank, difffit.rank) == (1, 2)
    text = gaps_markdown(find_results(tmp_path))
    assert "| near | 0.120 | 0.100 | 0.020 ± 0.010 | no | 1.0000 |" in text
    assert "| difffit | 25 % | 0.50 | 2 of 2 | 2.00 | 40 | 5 |" in text
    assert "| full | far | 0.300 | 50 % | 1.00 | 0.5000 | 1 |" in text


def test_a_table_that_is_not_complete_estimates_nothing(tmp_path):
    write(tmp_path / "0", "Full", "far", 0.3)
    write(tmp_path / "1", "DiffFit", "far", 0.4)
    write(tmp_path / "2", "DiffFit", "other", 0.4)
    write_run(tmp_path / "3", "BitFit", 0, "far", status="stopped")
    found = gaps(find_results(tmp_path))
    assert [method.name for method in found.methods] == ["full", "difffit"]
    difffit = found.methods[1]
    assert found.of_full(difffit, ["far", "other"]) is None
    assert found.common == ["far"]
    text = gaps_markdown(find_results(tmp_path))
    assert "| difffit | 25 % | not run | 2 of 2 | 2.00 |" in text
    assert "-0.100 (one dataset) | not ranked |" in text
    assert gaps([run for run in find_results(tmp_path) if not run.finished]) is None


def test_pairs_are_compared_image_by_image_and_ranked_outside_of_the_interval_only(tmp_path):
    """Losses of images differ far more than the methods do, and only their differences count."""
    for seed in (0, 1):
        write(
            tmp_path / f"f{seed}",
            "Full",
            "far",
            0.3,
            seed=seed,
            losses=[x - 0.1 - 0.001 * i for i, x in enumerate(LOSSES)],
        )
        write(tmp_path / f"d{seed}", "DiffFit", "far", 0.4, seed=seed, losses=LOSSES)
        mixed = [x + d for x, d in zip(LOSSES, (0.1, -0.1, 0.05, -0.06), strict=True)]
        write(tmp_path / f"b{seed}", "BitFit", "far", 0.4, seed=seed, losses=mixed)
    found = gaps(find_results(tmp_path))
    methods = {method.name: method for method in found.methods}
    clear = loss_difference(methods["full"], methods["difffit"], 0.95)
    assert clear.mean == pytest.approx(-0.1015)
    assert clear.high < 0
    unclear = loss_difference(methods["bitfit"], methods["difffit"], 0.95)
    assert not unclear.decides
    text = gaps_markdown(find_results(tmp_path))
    pairs = {line.split("|")[1].strip(): line for line in text.splitlines() if " less " in line and line[0] == "|"}
    assert len(pairs) == 3
    ordered = next(line for pair, line in pairs.items() if {"full", "difffit"} == set(pair.split(" less ")))
    assert ordered.split("|")[3].strip() == "full"
    level = next(line for pair, line in pairs.items() if {"bitfit", "difffit"} == set(pair.split(" less ")))
    assert level.split("|")[3].strip() == "not ranked"


def test_kid_is_paired_over_datasets(tmp_path):
    for k, data in enumerate("abcd"):
        write(tmp_path / f"f{data}", "Full", data, 0.2 + 0.05 * k)
        write(tmp_path / f"d{data}", "DiffFit", data, 0.25 + 0.05 * k + 0.001 * (k % 2))
    found = gaps(find_results(tmp_path))
    difference = kid_difference(found, *found.methods, 0.95)
    assert difference.count == 4
    assert difference.decides
    assert abs(difference.mean) == pytest.approx(0.0505)


def test_intervals_are_those_of_student():
    # published quantiles, two-sided 95 % and 99 %
    for p, freedom, value in ((0.975, 1, 12.7062), (0.975, 7, 2.3646), (0.975, 30, 2.0423), (0.995, 10, 3.1693)):
        assert t_quantile(p, freedom) == pytest.approx(value, abs=1e-4)
    one = paired([1.0, 2.0, 3.0], 0.95)
    assert (one.low, one.high) == (pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-3), pytest.approx(4.484, abs=1e-3))
    assert not paired([5.0], 0.95).decides
    two = stratified([[1.0, 2.0, 3.0], [0.0, 2.0, 4.0]], 0.95)
    assert two.mean == 2
    assert two.high - two.mean == pytest.approx(4.3027 * math.sqrt(1 / 3 + 4 / 3) / 2, abs=1e-3)


def test_drift_and_forgotten_classes_are_shown_where_they_were_measured(tmp_path):
    write(
        tmp_path / "0",
        "Full",
        "far",
        0.3,
        losses=LOSSES,
        drift={"mean": 0.25, "error": 0.01},
        forgotten={"before": 0.2, "after": 0.3, "error": 0.02, "classes": 30, "n": 8},
    )
    write(tmp_path / "1", "DiffFit", "far", 0.4, losses=LOSSES, drift={"mean": 0.125, "error": 0.01})
    text = drift_table(gaps(find_results(tmp_path)))
    assert "| full | far | 0 | 0.250 ± 0.010 | 0.200 | 0.300 | 0.020 |" in text
    assert "| difffit | far | 0 | 0.125 ± 0.010 |  |  |  |" in text


def test_the_plane_of_learned_and_forgotten(tmp_path):
    for seed, change in ((0, 0.1), (1, 0.2)):
        forgotten = {"before": 0.2, "after": 0.2 + change, "error": 0.02, "classes": 30, "n": 8}
        write(tmp_path / f"full_{seed}", "Full", "far", 0.3, seed=seed, losses=LOSSES, forgotten=forgotten)
    write(tmp_path / "difffit", "DiffFit", "far", 0.4, losses=LOSSES)  # not measured there
    write(tmp_path / "other", "Full", "other", 0.4)
    (axes,) = learned_and_forgotten(find_results(tmp_path)).axes
    assert axes.get_title() == "far"
    (mark,) = axes.containers
    ((x, y),) = mark.lines[0].get_xydata()
    assert (x, y) == (pytest.approx(50), pytest.approx(0.15))  # KID 0.5 of before, 0.1 of the own domain, 0.3 after
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["full"]
    write_report(tmp_path)
    assert (tmp_path / "forgotten.png").is_file()


def test_a_report_writes_them_where_there_is_a_gap(tmp_path):
    write(tmp_path / "with" / "0", "Full", "far", 0.3)
    write_run(tmp_path / "without" / "0", "Full", 0)
    for name, there in (("with", True), ("without", False)):
        write_report(tmp_path / name)
        assert (tmp_path / name / "gaps.md").is_file() == there

"""Methods x datasets: means, ranks, what is bold, what is told of runs that differ, and published figures."""

from pathlib import Path

import pytest

from ditune.metrics.names import family
from ditune.report.notes import RANK, differences, notes
from ditune.report.page import our_protocol, pivot_table, published_table
from ditune.report.pivot import Pivot, pivot
from ditune.report.published import PUBLISHED, published
from ditune.report.results import clearly_best, read_results
from ditune.report.tables import count, csv_pivot, markdown_pivot, pivot_cell
from run_results import metrics, write_run

KID = {"DiffFit": (0.2, 0.5, 0.3), "BitFit": (0.3, 0.5, 0.2), "Full": (0.1, 0.6, 0.1)}  # on a, b, c


def write_table(folder: Path, seeds: int = 1, **protocol: object) -> None:
    for method, values in KID.items():
        for data, value in zip("abc", values, strict=True):
            for seed in range(seeds):
                changed = metrics(value + 0.01 * seed, **protocol)
                write_run(folder / f"{method}_{data}_{seed}", method, seed, data, changed=changed)


def table_of(folder: Path) -> Pivot:
    return pivot(read_results(folder), [], "kid_x")


def test_means_and_ranks(tmp_path):
    write_table(tmp_path)
    table = table_of(tmp_path)
    lines = {line.label: line for line in table.lines}
    assert {name: line.mean for name, line in lines.items()} == pytest.approx(
        {"DiffFit": 1 / 3, "BitFit": 1 / 3, "Full": 0.8 / 3}
    )
    ranks = {"DiffFit": (2 + 1.5 + 3) / 3, "BitFit": (3 + 1.5 + 2) / 3, "Full": (1 + 3 + 1) / 3}  # a tie on b
    assert {name: line.rank for name, line in lines.items()} == pytest.approx(ranks)
    assert table.best == {}  # one seed each


def test_higher_can_be_better(tmp_path):
    write_table(tmp_path)
    for folder in tmp_path.iterdir():
        text = (folder / "result.json").read_text()
        (folder / "result.json").write_text(text.replace("kid_x", "precision_x"))
    ranks = {line.label: line.rank for line in pivot(read_results(tmp_path), [], "precision_x").lines}
    assert ranks == pytest.approx({"DiffFit": (2 + 2.5 + 1) / 3, "BitFit": (1 + 2.5 + 2) / 3, "Full": (3 + 1 + 3) / 3})


def test_a_method_without_a_figure_somewhere_has_no_mean_and_takes_no_rank(tmp_path):
    write_table(tmp_path)
    write_run(tmp_path / "Full_a_0", "Full", 0, "a", status="failed")
    lines = {line.label: line for line in table_of(tmp_path).lines}
    assert (lines["Full"].mean, lines["Full"].rank) == (None, None)
    assert lines["DiffFit"].rank == pytest.approx((1 + 1.5 + 2) / 3)
    text = markdown_pivot(table_of(tmp_path), [])
    assert "| Full | failed | 0.6000 | 0.1000 | 2 of 3 | - |" in text


def test_the_deviation_of_a_mean_is_that_over_seeds(tmp_path):
    write_table(tmp_path, seeds=2)
    table = table_of(tmp_path)
    full = next(line for line in table.lines if line.label == "Full")
    assert full.deviation == pytest.approx(0.01 / 2**0.5)
    assert {name: line.label for name, line in table.best.items()} == {"a": "Full", "c": "Full", "": "Full"}
    (tmp_path / "Full_b_1" / "result.json").unlink()  # the seeds are no longer the same everywhere
    table = table_of(tmp_path)
    full = next(line for line in table.lines if line.label == "Full")
    assert (full.mean, full.deviation) == (pytest.approx((0.105 + 0.6 + 0.105) / 3), None)
    assert pivot_cell(table, full, "b") == "0.6000 (1 of 2 seeds)"
    assert "1 to 2 for each figure" in notes(table, read_results(tmp_path))[0]


@pytest.mark.parametrize(
    ("values", "lower", "place"),
    [
        ([(1.0, 0.1), (2.0, 0.1)], True, 0),
        ([(1.0, 0.1), (2.0, 0.1)], False, 1),
        ([(1.0, 0.6), (2.0, 0.5)], True, None),  # their intervals overlap
        ([(1.0, None), (2.0, 0.1)], True, None),  # one seed
        ([(1.0, 0.1)], True, None),  # nothing to compare with
    ],
)
def test_only_what_seeds_allow_is_bold(values, lower, place):
    assert clearly_best(values, lower) == place


def test_rates_that_differ_on_a_dataset_make_lines_of_their_own(tmp_path):
    for k, rate in enumerate((1e-3, 1e-2)):
        write_run(tmp_path / str(k), "DiffFit", 0, changed={"lr": rate})
    write_run(tmp_path / "2", "DiffFit", 0, "b", changed={"lr": 1e-3})
    write_run(tmp_path / "3", "BitFit", 0, changed={"lr": 1e-2})
    write_run(tmp_path / "4", "BitFit", 0, "b", changed={"lr": 1e-3})  # the best rate of each dataset
    assert [(line.label, [*line.rows]) for line in table_of(tmp_path).lines] == [
        ("DiffFit, lr 0.001", ["a", "b"]),
        ("DiffFit, lr 0.01", ["a"]),
        ("BitFit", ["a", "b"]),
    ]


def test_what_differs_is_told(tmp_path):
    write_table(tmp_path, steps=50, guidance=1.5)
    assert differences(read_results(tmp_path), "kid_x") == []
    changed = metrics(0.1, steps=250, guidance=1.5) | {"max_steps": 20_000, "precision": "32-true"}
    write_run(tmp_path / "Full_c_0", "Full", 0, "c", changed=changed)
    write_run(tmp_path / "Full_a_0", "Full", 0, "a", changed=metrics(0.1, steps=50, guidance=4) | {"precision": "bf16"})
    assert differences(read_results(tmp_path), "kid_x") == [
        "Not comparable as they stand: the runs differ in steps of training. 20,000: Full on c; 10: the others.",
        "Not comparable as they stand: the runs differ in precision. bf16: Full on a; 32-true: the others.",
        "Not comparable as they stand: the runs differ in sampling steps. 250: Full on c; 50: the others.",
        "Not comparable as they stand: the runs differ in guidance. 4: Full on a; 1.5: the others.",
    ]


def test_the_number_of_interest_stands_first_on_a_phone(tmp_path):
    write_table(tmp_path)
    html = pivot_table(table_of(tmp_path))
    heads = [part.split('"')[0] for part in html.split('<th scope="col" class="')[1:]]
    assert heads == ["text", "narrow", "narrow", "", "", "", "wide", "wide", "", ""]
    assert RANK in notes(table_of(tmp_path), read_results(tmp_path))


def test_csv_has_plain_numbers(tmp_path):
    write_table(tmp_path, seeds=2)
    head, first, *_ = csv_pivot(table_of(tmp_path)).splitlines()
    assert head.startswith("method,a,a std,b,b std,c,c std,mean,mean std,rank,")
    assert first.split(",")[0] == "BitFit"
    assert float(first.split(",")[1]) == pytest.approx(0.305)


def test_counts_have_three_digits():
    assert [count(n) for n in (12, 999, 999.6, 31_520, 703_904, 999_950, 4_280_320, 673_799_072)] == [
        *("12", "999", "1.00 k", "31.5 k", "704 k", "1.00 M", "4.28 M", "674 M"),
    ]


def test_published_figures_stand_beside_ours(tmp_path):
    config = {"data": {"name": "cub", "resolution": 256}, "network": {"name": "dit_xl_2"}}
    protocol = {"n": 10_000, "sampler": "DDPM {'clip': 0.0}", "steps": 50, "guidance": 1.5}
    changed = metrics(7.5, "fid_10k", **protocol) | {"peft": {"name": "difffit"}, "method": "difffit"}
    write_run(tmp_path / "0", "DiffFit", 0, "cub", changed=changed, config=config)
    table = pivot(read_results(tmp_path), [], "fid_10k")
    html = published_table(table)
    for part in ("5.48", "7.50", "protocol unknown", "as quoted by wizwand.com", "10,000 images, DDPM 50 steps"):
        assert part in html
    assert our_protocol(table.lines[0].rows["cub"], "fid_10k").startswith("dit_xl_2, 10 steps of 4 images, 10,000")
    assert published_table(pivot(read_results(tmp_path), [], "test_loss")) == ""  # a loss is no FID
    assert published("difffit", "cub", "fid_10k", {"data.resolution": 512}) == []
    assert published("difffit", "flowers102", "fid_10k", {"data.resolution": 256}) == []  # none is surely its own


def test_every_published_figure_has_a_source_and_a_metric():
    for figure in PUBLISHED:
        assert family(figure.metric) is not None
        assert figure.source
        assert figure.protocol
    # what was not read in the paper itself says by whom it is quoted
    assert all("as quoted by" in figure.source for figure in PUBLISHED if figure.data not in ("imagenet", "celebahq"))
    assert len({(f.method, f.data, f.source, f.protocol, f.value) for f in PUBLISHED}) == len(PUBLISHED)

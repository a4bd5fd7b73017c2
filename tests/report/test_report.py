"""Reports of sweeps: right means, nothing for what did not run, one page that needs nothing but itself."""

import csv
import html.parser
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ditune.errors import UserError
from ditune.report import markdown_table, read_results
from ditune.report.notes import notes
from ditune.report.pivot import pivot
from ditune.report.plots import loss_curve
from ditune.report.results import best, main_metric, rows
from ditune.report.tables import latex_table
from ditune.report.thumbnails import methods_sheet
from ditune.report.write import write_report
from helpers import ROOT
from run_results import METHODS, write_run

FILES = {"results.csv", "table.csv", "table.md", "table.tex", "pareto.png", "curves.png", "samples.png", "report.html"}


def write_sweep(folder: Path) -> Path:
    """Two seeds of two methods on data a, of one of them on b, where the third has failed."""
    number = iter(range(100))
    for method in ("DiffFit", "BitFit"):
        for seed in (0, 1):
            write_run(folder / str(next(number)), method, seed)
    write_run(folder / str(next(number)), "DiffFit", 0, "b")
    write_run(folder / str(next(number)), "Full", 0, "b", status="failed")
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep with its report."""
    folder = write_sweep(tmp_path_factory.mktemp("sweep"))
    write_report(folder)
    return folder


def test_means_deviations_and_the_best(sweep):
    table = rows(read_results(sweep))
    assert [(row.method, row.data, len(row.finished), len(row.runs)) for row in table] == [
        ("DiffFit", "a", 2, 2),
        ("BitFit", "a", 2, 2),
        ("DiffFit", "b", 1, 1),
        ("Full", "b", 0, 1),
    ]
    assert table[0].mean("kid_x") == pytest.approx(0.305)
    assert table[0].deviation("kid_x") == pytest.approx(statistics.stdev([0.30, 0.31]))
    assert table[2].deviation("kid_x") is None
    assert table[3].mean("kid_x") is None
    assert best(table, "kid_x") == {"a": pytest.approx(0.305)}  # the least; on b there is nothing to compare with
    assert best(table, "precision_x") == {"a": pytest.approx(0.70)}  # the greatest
    assert best(table, "parameters") == best(table, "kid_x_std") == best(table, "kid_x before") == {}
    assert main_metric(read_results(sweep)) == "kid_x"


def test_markdown(sweep):
    header, _, difffit, bitfit, _, full = markdown_table(read_results(sweep)).splitlines()
    assert header.startswith("| method | data | kid_x | status | trainable parameters |")
    assert difffit.startswith("| DiffFit | a | **0.3050 ± 0.0071** | 2 finished | 40 |")
    assert "| 0.5000 |" in difffit  # before
    assert bitfit.startswith("| BitFit | a | 0.3550 ± 0.0071 |")
    assert {text.strip() for text in full.split("|")[3:-3]} == {"failed"}


def test_latex_has_the_columns_of_the_papers(sweep):
    runs = read_results(sweep)
    table = pivot(runs, [], "kid_x")
    lines = latex_table(table, notes(table, runs)).splitlines()
    assert lines[2] == r"method & a & b & mean & rank & trained & share \\"
    difffit = r"DiffFit & \textbf{0.3050 $\pm$ 0.0071} & 0.3000 (1 of 2 seeds) & 0.3025 & 1.00 & 40 & 1.00 \% \\"
    assert lines[4] == difffit
    assert lines[5] == r"BitFit & 0.3550 $\pm$ 0.0071 & not run & 1 of 2 & - & 30 & 0.75 \% \\"
    assert lines[6] == r"Full & not run & failed & 0 of 2 & - & 4.00 k & 100.00 \% \\"


def test_what_a_sweep_varies_is_told_apart(tmp_path):
    for k, steps in enumerate((1, 4, 128)):
        write_run(tmp_path / str(k), "DiffFit", 0, config={"sampler": {"steps": steps}})
    assert [row.label for row in rows(read_results(tmp_path))] == [
        f"DiffFit (sampler.steps={steps})" for steps in (1, 4, 128)
    ]


def test_what_changes_no_result_tells_no_rows_apart(tmp_path):
    for seed, devices in enumerate((1, 8)):
        config = {"trainer": {"devices": devices}, "tags": [str(devices)], "paths": {"output_dir": f"/{devices}"}}
        write_run(tmp_path / str(seed), "DiffFit", seed, config=config)
    assert [(row.label, len(row.runs)) for row in rows(read_results(tmp_path))] == [("DiffFit", 2)]


def test_curves_are_smoothed_and_skip_what_is_not_there(sweep, tmp_path):
    points = loss_curve(sweep / "0" / "metrics.csv")
    assert points[0] == (0, 2.0)
    assert points[1] == (1, pytest.approx(0.9 * 2 + 0.1 * 1.9))
    assert len(points) == 10
    assert loss_curve(tmp_path / "none.csv") == []


def test_sheet_has_methods_in_rows_and_data_in_columns(sweep):
    sheet = methods_sheet(read_results(sweep))
    second = 8 + 20 + 18 + 8  # below the first row's pictures (2 x 10 pixels), its text and the gap
    assert sheet.getpixel((12, 12)) == (40, 0, 0)  # DiffFit on a
    assert sheet.getpixel((12, second + 4)) == (30, 0, 0)  # BitFit on a
    assert sheet.getpixel((8 + 82 + 8 + 4, second + 4)) == (255, 255, 255)  # BitFit on b, not run


class Page(html.parser.HTMLParser):
    """Headings and cells by row, what a page fetches, and where it links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.classes: list[list[str]] = []
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.images = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.images += tag == "img"
        if tag == "a":
            self.links.append(values["href"])
        elif "href" in values or not values.get("src", "data:").startswith("data:"):
            self.fetched.append(values.get("href") or values["src"])
        if tag == "tr":
            self.rows.append([])
            self.classes.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(values.get("data-value"))
            self.classes[-1].append(values.get("class", ""))


def test_everything_is_written_and_the_page_stands_alone(written):
    assert {path.name for path in written.iterdir()} >= FILES
    lines = list(csv.DictReader((written / "results.csv").open()))
    assert [line["status"] for line in lines] == ["finished"] * 5 + ["failed"]
    assert float(lines[1]["kid_x"]) == pytest.approx(0.31)
    assert lines[5]["kid_x"] == ""
    page = Page((written / "report.html").read_text())
    assert page.fetched == []
    assert "http" not in (written / "report.html").read_text()
    assert page.images == 3 + 3 + 2  # of the mean and both datasets, samples, training
    assert page.links == ["0/samples/grid.png", "4/samples/grid.png", "2/samples/grid.png"]
    assert all((written / link).is_file() for link in page.links)
    methods = [row for row in page.rows if row and row[0] in METHODS]
    assert [row[0] for row in methods] == ["DiffFit", "BitFit", "Full", "DiffFit", "BitFit", "DiffFit", "Full"]
    assert methods[6][1] == ""  # stays below when sorted


def test_headings_are_aligned_as_their_cells(written):
    page, text = Page((written / "report.html").read_text()), []
    for classes in page.classes:
        if classes and "text" in classes[0] and len(text) != len(classes):
            text = ["text" in kind for kind in classes]
        assert ["text" in kind for kind in classes] == text


def test_pictures(written):
    for name in ("pareto", "curves", "samples"):
        with Image.open(written / f"{name}.png") as image:
            assert image.width > 160


def test_names_from_configs_are_only_text(tmp_path):
    write_run(tmp_path / "0", "DiffFit", 0, "<script>alert(1)</script>")
    write_report(tmp_path)
    assert "<script>alert" not in (tmp_path / "report.html").read_text()


def test_unfinished_sweeps_and_wrong_metrics(tmp_path, sweep):
    with pytest.raises(UserError, match="Choose one of these"):
        write_report(sweep, "fid_10k")
    empty = tmp_path / "empty"
    with pytest.raises(UserError, match=r"no result\.json"):
        write_report(empty)
    write_run(empty / "0", "Full", 0, status="killed")
    assert "| killed |" in write_report(empty)
    assert not (empty / "table.tex").exists()


def test_entry_point(sweep):
    command = [sys.executable, "src/report.py", f"sweep={sweep}", "metric=precision_x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (sweep / "table.md").read_text() + f"\n{sweep}/report.html shows all of it.\n"
    assert "0.7000" in (sweep / "table.tex").read_text()
    assert (sweep / "results.csv").read_text().startswith("folder,method,data,precision_x,status,reason,")


def test_precisions_are_never_pooled(tmp_path):
    """Nor compared without a word: one method in bf16 and another in fp32 say so as well."""
    for number, (method, seed, precision) in enumerate(
        [("DiffFit", 0, "bf16-mixed"), ("DiffFit", 1, "32-true"), ("BitFit", 0, "32-true")]
    ):
        write_run(tmp_path / str(number), method, seed, config={"trainer": {"precision": precision}})
    table = rows(read_results(tmp_path))
    assert [row.label for row in table] == [
        "DiffFit (trainer.precision=bf16-mixed)",
        "DiffFit (trainer.precision=32-true)",
        "BitFit (trainer.precision=32-true)",
    ]
    assert [len(row.runs) for row in table] == [1, 1, 1]

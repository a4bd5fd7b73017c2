"""Reports of sweeps: right means, nothing for what did not run, one page that needs nothing but itself."""

import csv
import html.parser
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ditune.errors import UserError
from ditune.report import markdown_table, read_results
from ditune.report.plots import loss_curve, methods_sheet
from ditune.report.results import best, main_metric, rows
from ditune.report.tables import latex_table
from ditune.report.write import write_report
from helpers import ROOT

METHODS = {"DiffFit": (40, 0.30), "BitFit": (30, 0.35), "Full": (4000, 0.20)}  # trained parameters, KID of seed 0
FILES = {"results.csv", "table.md", "table.tex", "pareto.png", "curves.png", "samples.png", "report.html"}


def write_run(
    folder: Path, method: str, seed: int, data: str = "a", status: str = "finished", **config: object
) -> None:
    parameters, kid = METHODS[method]
    result = {
        "status": status,
        "method": method,
        "peft": {"name": method.lower()},
        "parameters": {"trainable": parameters, "total": 4000, "share": parameters / 4000},
        "batch_size": 4,
        "max_steps": 10,
        "lr": 1e-3,
        "seed": seed,
        "data": {"name": data},
    }
    if status == "finished":
        after = {"kid_x": kid + 0.01 * seed, "kid_x_std": 0.001, "precision_x": 1 - kid, "n": 8}
        result |= {
            "seconds": {"fit": 5.0},
            "images_per_second": 8.0,
            "denoising": {"before": 1.0, "after": 0.5},
            "metrics": {"protocol": {"n": 8}, "before": {"kid_x": 0.5}, "after": after},
        }
        (folder / "samples").mkdir(parents=True)
        Image.new("RGB", (8 * 10 + 2, 8 * 10 + 2), (parameters % 256, 0, 0)).save(folder / "samples" / "grid.png")
        lines = ["step,train/loss,other", *(f"{step},{2 - step / 10},1" for step in range(10)), "10,,2"]
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": seed, "sampler": {"steps": 25}} | config))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two seeds of two methods on data a, of one of them on b, where the third has failed."""
    number = iter(range(100))
    for method in ("DiffFit", "BitFit"):
        for seed in (0, 1):
            write_run(tmp_path / str(next(number)), method, seed)
    write_run(tmp_path / str(next(number)), "DiffFit", 0, "b")
    write_run(tmp_path / str(next(number)), "Full", 0, "b", status="failed")
    return tmp_path


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
    assert "| kid_x before | kid_x |" in header
    assert "| **0.3050 ± 0.0071** |" in difffit
    assert "| 0.5000 |" in difffit  # before
    assert "**" not in bitfit.replace("**0.5000**", "")
    assert full.split("|")[5].strip() == "0 of 1"
    assert full.count("not run") == len(full.split("|")) - 7


def test_latex(sweep):
    lines = latex_table(read_results(sweep), "kid_x").splitlines()
    assert lines[2] == r"Method & Trained & a & b \\"
    assert lines[4] == r"DiffFit & 1.00 \% & \textbf{0.3050 $\pm$ 0.0071} & 0.3000 \\"
    assert lines[5] == r"BitFit & 0.75 \% & 0.3550 $\pm$ 0.0071 & not run \\"
    assert lines[6] == r"Full & not run & not run & not run \\"


def test_what_a_sweep_varies_is_told_apart(tmp_path):
    for k, steps in enumerate((1, 4, 128)):
        write_run(tmp_path / str(k), "DiffFit", 0, sampler={"steps": steps})
    assert [row.label for row in rows(read_results(tmp_path))] == [
        f"DiffFit (sampler.steps={steps})" for steps in (1, 4, 128)
    ]


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
    """Cells by row, and everything that a page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.fetched: list[str] = []
        self.images = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.images += tag == "img"
        for name in ("src", "href"):
            if name in values and not values[name].startswith("data:"):
                self.fetched.append(values[name])
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append(values["data-value"])


def test_everything_is_written_and_the_page_stands_alone(sweep):
    write_report(sweep)
    assert {path.name for path in sweep.iterdir()} >= FILES
    lines = list(csv.DictReader((sweep / "results.csv").open()))
    assert [line["status"] for line in lines] == ["finished"] * 5 + ["failed"]
    assert float(lines[1]["kid_x"]) == pytest.approx(0.31)
    assert lines[5]["kid_x"] == ""
    page = Page((sweep / "report.html").read_text())
    assert page.fetched == []
    assert "http" not in (sweep / "report.html").read_text()
    assert page.images == 3
    methods = [row for row in page.rows if row and row[0] in METHODS]
    assert [row[0] for row in methods] == ["DiffFit", "BitFit", "DiffFit", "Full"]
    assert methods[3][-1] == ""  # stays below when sorted
    for name in ("pareto", "curves", "samples"):
        with Image.open(sweep / f"{name}.png") as image:
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
    assert "not run" in write_report(empty)
    assert not (empty / "table.tex").exists()


def test_entry_point(sweep):
    command = [sys.executable, "src/report.py", f"sweep={sweep}", "metric=precision_x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (sweep / "table.md").read_text() + f"\n{sweep}/report.html shows all of it.\n"
    assert "0.7000" in (sweep / "table.tex").read_text()


def test_precisions_are_never_pooled(tmp_path):
    """Nor compared without a word: one method in bf16 and another in fp32 say so as well."""
    for number, (method, seed, precision) in enumerate(
        [("DiffFit", 0, "bf16-mixed"), ("DiffFit", 1, "32-true"), ("BitFit", 0, "32-true")]
    ):
        write_run(tmp_path / str(number), method, seed, trainer={"precision": precision})
    table = rows(read_results(tmp_path))
    assert [row.label for row in table] == [
        "DiffFit (trainer.precision=bf16-mixed)",
        "DiffFit (trainer.precision=32-true)",
        "BitFit (trainer.precision=32-true)",
    ]
    assert [len(row.runs) for row in table] == [1, 1, 1]

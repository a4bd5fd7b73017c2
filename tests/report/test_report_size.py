"""The paper's table: 56 runs at 256 pixels make a page that can be sent by mail."""

import json
import os
import shutil

import numpy as np
from PIL import Image

from ditune.report.page import html_page
from ditune.report.pivot import pivot
from ditune.report.results import find_results, main_metric
from ditune.report.thumbnails import WIDTH, methods_sheet
from helpers import ROOT

DATA = ("food101", "sun397", "df20m_mini", "caltech101", "cub", "artbench10", "flowers102", "stanford_cars")
METHODS = ("full", "adaptformer", "adapter", "bitfit", "vpt_deep", "lora", "difffit")
RESULTS = ROOT / "docs" / "results" / "pixels_table"
BYTES = 5_000_000


def write_grid(path, side=256, rows=2):
    """Colourful noise of the coarseness of photographs, which compresses worse than they do."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (rows * 16, 8 * 16, 3), dtype=np.uint8))
    small.resize((8 * (side + 2) + 2, rows * (side + 2) + 2), Image.Resampling.BICUBIC).save(path, compress_level=1)


def test_the_page_of_56_runs_is_small(tmp_path):
    write_grid(tmp_path / "grid.png")
    for number, (method, data) in enumerate((method, data) for data in DATA for method in METHODS):
        folder = tmp_path / str(number)
        (folder / "samples").mkdir(parents=True)
        os.link(tmp_path / "grid.png", folder / "samples" / "grid.png")
        result = json.loads((RESULTS / f"{method}_0" / "result.json").read_text())
        result["data"]["name"] = data
        (folder / "result.json").write_text(json.dumps(result))
    runs = find_results(tmp_path)
    assert len(runs) == 56
    page = html_page(tmp_path, runs, [], pivot(runs, [], main_metric(runs)))
    assert page.count("<a href") == 56
    assert 500_000 < len(page.encode()) < BYTES  # the thumbnails are there
    sheet = methods_sheet(runs[:: len(METHODS)])
    assert sheet.width < 1.2 * WIDTH
    shutil.rmtree(tmp_path)

"""The app's functions, and the app itself by Gradio's client where Gradio is installed."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from browser import CHROMIUM, opened
from ditune.commands import app as module
from ditune.commands.app import REQUIREMENT, build, first_settings
from ditune.commands.side_by_side import BASE, COLUMNS, Shelf, at_strength, plot, sheet_of, sweeps, table
from ditune.commands.train import train
from ditune.errors import UserError
from ditune.generation.grids import grid
from helpers import ROOT, SMALL, compose, task
from run_results import write_run


@pytest.fixture(scope="module")
def cfg(tmp_path_factory, pictures, base):
    """Config of the app: a tiny base, a run on it, and a sweep."""
    folder = tmp_path_factory.mktemp("app")
    adapted = [f"data.root={pictures}", "peft=difffit", f"pretrained={base}", "max_steps=4", "optimizer.lr=0.1"]
    assert train(compose(folder / "runs" / "first", *SMALL, *adapted)) == 0
    for method, seed in (("DiffFit", 0), ("DiffFit", 1), ("BitFit", 0)):
        write_run(folder / "sweeps" / "table" / f"{method}_{seed}", method, seed)
    places = [f"runs={folder}/runs", f"sweeps={folder}/sweeps", f"paths.cache_dir={folder}/cache"]
    return task("app", f"checkpoint={base}", "autoencoder=none", *places)


def test_networks_generate_from_the_same_noise(cfg):
    shelf = Shelf(cfg)
    assert shelf.names() == [BASE, "first"]
    assert shelf.classes([BASE, "first"]) == ["cat", "dog", "eel"]
    a, b = shelf.generate([BASE, "first"], ["dog"], n=4, seed=3, steps=2, guidance=1.5)
    assert (a[1], b[1]) == (BASE, "first")
    assert a[0].size == b[0].size
    (again,) = shelf.generate(["first"], ["dog"], n=4, seed=3, steps=2, guidance=1.5)
    (other,) = shelf.generate(["first"], ["dog"], n=4, seed=4, steps=2, guidance=1.5)
    images = [pil_to_tensor(sheet).int() for sheet, _ in (b, again, a, other)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])  # the adapter does something
    assert not torch.equal(images[0], images[3])  # and so does the noise
    for name, sheet in ((BASE, images[2]), ("first", images[0])):
        trained = shelf.load(name)
        generator = replace(trained.generator, steps=2, guidance=1.5)
        alone = grid(generator.generate(trained.network, torch.ones(4, dtype=torch.int64), 3), 2, labels=["dog"] * 4)
        assert torch.equal(pil_to_tensor(alone).int(), sheet)


def test_strength_leads_from_the_base_to_the_adapter(cfg):
    shelf = Shelf(cfg)

    def images(name, strength):
        ((sheet, _),) = shelf.generate([name], ["dog"], n=4, seed=3, steps=2, guidance=1.5, strength=strength)
        return pil_to_tensor(sheet).int()

    base, half, whole = images(BASE, 0.5), images("first", 0.5), images("first", 1)
    assert torch.equal(images("first", 0), base)
    assert torch.equal(images("first", 1), whole)  # nothing of the other strengths is left
    assert not torch.equal(half, base)
    assert not torch.equal(half, whole)
    run = shelf.load("first")
    with pytest.raises(UserError, match="Strength is 0, and first has other classes"):
        at_strength(replace(run, reshaped=True), 0)


def test_what_cannot_be_generated_is_said(cfg):
    shelf = Shelf(cfg)
    for names, classes, text in (
        ([], [], "No network is chosen"),
        (["../../x"], [], r"There is no run \.\./\.\./x"),
        ([BASE], ["fox"], "Not all of these networks know fox"),
    ):
        with pytest.raises(UserError, match=text):
            shelf.generate(names, classes, 1, 0, 2, 1.0)


def test_a_sweep_is_a_table_a_plot_and_images(cfg):
    folder = Path(cfg.sweeps) / "table"
    assert sweeps(cfg.sweeps) == ["table"]
    runs, metric, rows = table(folder)
    assert len(rows) == 3
    assert all(len(row) == len(COLUMNS) for row in rows)
    assert [row[0] for row in rows] == [run.folder.name for run in runs]
    assert plot(runs, metric) is not None
    for run in runs:
        path = sheet_of(folder, run)
        assert path is not None
        assert run.folder in path.parents
    assert sweeps(Path(cfg.sweeps) / "none") == []


def test_it_opens_on_the_shipped_base_without_any_run(tmp_path):
    shelf = Shelf(task("app", f"runs={tmp_path}/none"))
    assert shelf.names() == [BASE]
    assert len(shelf.classes([BASE])) == 98
    assert first_settings(shelf, [BASE]) == (25, 5.0)


def test_a_missing_gradio_is_named_with_its_command(cfg, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package gradio"):
        build(cfg)
    for file in ("requirements-extras.txt", "pyproject.toml"):
        assert REQUIREMENT in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.skipif(find_spec("gradio") is None, reason="gradio, an optional package, is not installed")
def test_the_app_answers_a_client(cfg):
    from gradio_client import Client

    app = build(cfg)
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, share=False, server_name="127.0.0.1")
    try:
        client = Client(url, verbose=False)
        sheets = client.predict([BASE, "first"], ["cat"], 4, 2, 1.5, 0, 1, api_name="/generate")
        assert [sheet["caption"] for sheet in sheets] == [BASE, "first"]
        expected, _ = Shelf(cfg).generate([BASE, "first"], ["cat"], n=4, seed=0, steps=2, guidance=1.5)
        with Image.open(sheets[0]["image"]) as shown:
            assert torch.equal(pil_to_tensor(shown.convert("RGB")), pil_to_tensor(expected[0]))
        rows, figure = client.predict("table", api_name="/sweep")
        assert rows["headers"] == list(COLUMNS)
        assert len(rows["data"]) == 3
        assert figure["plot"].startswith("data:image")
        with pytest.raises(Exception, match="No network is chosen"):
            client.predict([], [], 1, 2, 1.0, 0, 1, api_name="/generate")
    finally:
        app.close()


@pytest.mark.skipif(find_spec("gradio") is None, reason="gradio, an optional package, is not installed")
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
def test_the_app_in_a_browser(cfg):
    app = build(cfg)
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, share=False, server_name="127.0.0.1")
    try:
        with opened(url) as page:
            page.wait_for_text("Generate")
            page.click("button", "Generate")
            assert page.images(2) == 2  # the base's sheet and the run's
            for caption in (BASE, "first"):
                page.wait_for_text(caption)
            page.click("button[role=tab]", "Sweep")
            page.click(".body-cell", "BitFit")  # a row of the table
            assert page.images(3) == 3
    finally:
        app.close()

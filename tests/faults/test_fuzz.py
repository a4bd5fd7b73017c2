"""Whatever stands in an override or in a file that is read: a result, or sentences of ours, and never a bare traceback.

Hypothesis chooses the same examples every time. A failure shows the smallest one that it has found.
"""

import contextlib
import io
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import Changes, changes, mutated, overrides

from ditune import cli
from ditune.commands.prepare import prepare
from ditune.config.instantiate import instantiate
from ditune.config.keys import leaves
from ditune.data import ImageDataset
from ditune.data.latents import Latents
from ditune.data.prepare import cache_of
from ditune.evaluation.image_arrays import channels_first, read_array
from ditune.report import read_results
from ditune.run import load_run
from ditune.training.loggers.metrics_csv import MetricsCsv
from ditune.training.result import has_finished, read_result
from helpers import ROOT, compose
from miniatures import cub
from small_datasets import make, prepare_config, table, tree

GROUPS = ("augment", "balance", "data", "ema", "network", "objective", "optimizer", "peft", "sampler", "scheduler")
fuzzed = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


# Overrides


@cache
def options() -> dict[str, list[str]]:
    """The options of the groups of train.yaml."""
    return {group: sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml")) for group in GROUPS}


@cache
def keys() -> list[str]:
    """The keys of train.yaml that set no place for files."""
    names = [name for name, _, _ in leaves(compose(Path("run")))]
    return [name for name in names if not name.startswith(("paths", "hydra")) and not name.endswith("_dir")]


@given(st.data())
@settings(fuzzed, max_examples=10)
def test_overrides(tmp_path, monkeypatch, data):
    """Composed and checked as train.py does it, without the training."""
    monkeypatch.chdir(tmp_path)
    arguments = data.draw(overrides(keys(), options()))
    monkeypatch.setattr(sys, "argv", [str(ROOT / "src" / "train.py"), *arguments])
    code, written = 0, io.StringIO()
    with contextlib.redirect_stderr(written):
        try:
            cli.entry_point("train")(lambda cfg: None)()
        except SystemExit as ended:
            code = ended.code
    assert code in (0, 2)
    if code:
        assert written.getvalue().startswith("\nError: ")


# Files


@pytest.fixture(scope="session")
def places(tmp_path_factory, whole, start, base) -> dict[str, Path]:
    """A folder with each kind of file, by name."""
    root = tmp_path_factory.mktemp("fuzzed")
    assert start(root / "adapted", "peft=lora", f"pretrained={base}", "max_steps=1") == 0
    shutil.copytree(whole, root / "run")
    cub(root / "cub")
    prepare(prepare_config(root / "cub"))
    rows = [{"file_name": name, "label": name[:3], "split": "train"} for name in tree()]
    make(root / "images", tree() | {"metadata.csv": table(rows)})
    make(root / "images.zip", tree())
    np.savez(root / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    return {path.name: path for path in root.iterdir()}


def read_run(folder: Path) -> None:
    load_run(folder)


def read_results_of(folder: Path) -> None:
    read_results(folder)
    has_finished(folder, "job", "identity")
    read_result(folder)


def read_log(folder: Path) -> None:
    MetricsCsv(folder).keep_until(100)


def read_images(place: Path) -> None:
    ImageDataset(place, 8, split="train").load()


def read_npz(path: Path) -> None:
    channels_first(read_array(path)[1], "images")


def read_prepared(root: Path) -> None:
    """Manifest and latents, as a training reads them."""
    cfg = prepare_config(root)
    images, autoencoder = instantiate(cfg.data.pictures, "data"), instantiate(cfg.autoencoder, "autoencoder")
    latents = Latents(*cache_of(images, autoencoder, root / "prepared"))
    latents.take(range(len(latents)))


CACHE = "prepared/latents/train_16_patchpca_16"
HEAD = 2500  # first bytes of a safetensors file, which say what is in it
FILES: dict[str, tuple[str, Callable[[Path], None], int | None, int]] = {  # ..., bytes to change, examples
    "run/result.json": ("run", read_results_of, None, 150),
    "run/metrics.csv": ("run", read_log, None, 150),
    "run/config.yaml": ("run", read_run, None, 60),
    "run/network.safetensors": ("run", read_run, HEAD, 25),
    "adapted/adapter/adapter_config.json": ("adapted", read_run, None, 25),
    "adapted/adapter/adapter_model.safetensors": ("adapted", read_run, HEAD, 25),
    f"cub/{CACHE}/labels.npy": ("cub", read_prepared, None, 10),
    f"cub/{CACHE}/latents.npy": ("cub", read_prepared, 128, 10),
    f"cub/{CACHE}/header.json": ("cub", read_prepared, None, 10),
    "cub/prepared/manifest.csv": ("cub", read_prepared, None, 10),
    "images/metadata.csv": ("images", read_images, None, 100),
    "images/cat/0.png": ("images", read_images, None, 60),
    "images.zip": ("images.zip", read_images, None, 100),
    "images.npz": ("images.npz", read_npz, None, 150),
}


@pytest.mark.parametrize("name", FILES)
def test_bytes(places, name):
    place, read, limit, examples = FILES[name]
    path = places[place].parent / name
    content = path.read_bytes()
    read(places[place])  # whole it is read

    @given(changes)
    @settings(fuzzed, max_examples=examples)
    def fuzz(what: Changes) -> None:
        path.write_bytes(mutated(content, what, limit))
        try:
            read(places[place])
        except Exception as error:
            if cli.message(error) is None:
                raise

    try:
        fuzz()
    finally:
        path.write_bytes(content)

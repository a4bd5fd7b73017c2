"""Fixtures of all tests: tiny pictures, a tiny base network, tiny trainings."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from PIL import Image

from ditune.checkpoints import save_network
from ditune.config.components import build_components
from ditune.config.parse_once import parse_once
from helpers import ROOT, SMALL, compose, open_gates

CLASSES = ("cat", "dog", "eel")


def pytest_configure() -> None:
    """Processes and notebooks that tests start import the package as the tests do.

    Of several workers (make test) each computes in one thread, and so do the processes that it starts.
    """
    parse_once()  # thousands of configs are composed
    paths = (str(ROOT / "src"), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Environment variables are those of before after every test.

    A DDP training within this process leaves LOCAL_RANK and MASTER_PORT. A process that is started later takes them for
    those of an external launcher, and waits for its other ranks.
    """
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ten training pictures of three classes, 16 x 16, and two test pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 2)):
        for i in range(count):
            path = folder / split / CLASSES[i % 3] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    classes = folder / "classes.txt"
    classes.write_text("\n".join(CLASSES))
    return folder


@pytest.fixture
def small(tmp_path: Path, pictures: Path) -> Callable[..., DictConfig]:
    """`small(*overrides, folder=...)`: config of a training that takes a second."""

    def make(*overrides: str, folder: Path = tmp_path / "run") -> DictConfig:
        return compose(folder, *SMALL, f"data.root={pictures}", *overrides)

    return make


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """File of a tiny base network for `pictures`, as a training writes it.

    What a fresh DiT begins with as zeros has values: behind gates of zero an adapter gets no gradient.
    """
    folder = tmp_path_factory.mktemp("base")
    parts = build_components(compose(folder, *SMALL, f"data.root={pictures}", "peft=full"))
    open_gates(parts.network)
    path = folder / "base.safetensors"
    save_network(
        path,
        parts.network,
        parts.objective.process.config,
        class_names=parts.images.class_names,
        autoencoder=parts.autoencoder.latent_fingerprint,
        data=parts.images.fingerprint,
        resolution=16,
        steps=0,
    )
    return path


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B sees no account of the developer, and nothing could be sent."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))

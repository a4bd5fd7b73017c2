"""Runs that faults strike: one that nothing has struck, and a stopped one, of which each test takes a copy."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from injectors import during_training_step, terminate

from ditune.commands.train import train
from helpers import SMALL, compose

STEPS = 7
EVERY = 2
COMMON = ["peft=full", f"max_steps={STEPS}", f"callbacks.checkpoint.every_n_steps={EVERY}"]
Start = Callable[..., int]


@pytest.fixture(scope="session")
def start(pictures: Path) -> Start:
    """`start(folder, *overrides)`: exit code of a training in the folder."""

    def run(folder: Path, *overrides: str) -> int:
        return train(compose(folder, *SMALL, f"data.root={pictures}", *COMMON, *overrides))

    return run


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Path:
    """A run that nothing has struck."""
    folder = tmp_path_factory.mktemp("whole")
    assert start(folder) == 0
    return folder


@pytest.fixture(scope="session")
def at_six(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Path:
    """A run that a signal has stopped at step 6 of 7, with the checkpoints of 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("at_six")
    with pytest.MonkeyPatch.context() as patch:
        during_training_step(patch, 6, terminate)
        assert start(folder, "callbacks.checkpoint.keep=-1") == 143
    return folder


@pytest.fixture
def stopped(at_six: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(at_six, tmp_path / "run"))

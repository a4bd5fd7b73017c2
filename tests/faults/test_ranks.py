"""Several ranks: one log for all of them, one cause for their end, and no drift that nobody sees."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from ditune.commands import train as command
from ditune.files.atomic import read_json
from ditune.training.callbacks import compare_ranks
from ditune.training.module import GenerativeModule
from helpers import ROOT, SMALL
from trials import Trial, finished, pair, wait_for

pytestmark = pytest.mark.ddp


@pytest.fixture
def common(pictures: Path) -> list[str]:
    return [*SMALL, f"data.root={pictures}", "peft=full", "max_steps=6", "callbacks.samples.n=0", "batch_size=8"]


def logged(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


CASES = {
    "experts": ["network=tiny_moe", "balance=global", "max_steps=3"],
    "accumulated": ["trainer.accumulate_grad_batches=2", "max_steps=3"],
}


@pytest.mark.parametrize("case", CASES)
def test_the_log_of_two_ranks_is_that_of_one(common, tmp_path, case):
    overrides = [*common, *CASES[case], "trainer.gradient_clip_val=null"]
    ranks = pair(tmp_path / "two", overrides)
    alone = Trial(tmp_path / "one", overrides)
    assert finished([*ranks, alone]) == [0, 0, 0], ranks[1].output
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            # gradients are sums in another order, and Adam's first steps blow their rounding up
            tolerance = 1e-6 if a["step"] == 0 else 1e-4
            assert b[name] == pytest.approx(value, abs=tolerance, rel=tolerance, nan_ok=True), name


def on_rank(rank: int, step: int, fault):
    """Do something to the module of one rank before a step."""

    def inject() -> None:
        original = GenerativeModule.micro_step

        def micro_step(module: GenerativeModule, batch: tuple) -> tuple:
            if os.environ["RANK"] == str(rank) and module.step_of(batch) == step:
                fault(module)
            return original(module, batch)

        GenerativeModule.micro_step = micro_step

    return inject


def drift(module: GenerativeModule) -> None:
    with torch.no_grad():
        module.network.x_embedder.proj.weight.view(-1)[3] += 1e-6


def test_ranks_that_drift_apart_are_stopped(common, tmp_path):
    ranks = pair(tmp_path / "run", [*common, "callbacks.ranks.compare_every_n_steps=2"], on_rank(1, 2, drift))
    assert 0 not in finished(ranks)
    error = read_json(tmp_path / "run" / "result.json")["error"]
    assert error.startswith("After step 4 the weight of x_embedder.proj.weight of rank 1 is not that of rank 0.")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_bit_changes_the_checksum(dtype):
    values = torch.randn(1000).to(dtype)
    other = values.clone()
    bits = other.view(compare_ranks.WORDS[values.element_size()])
    bits[517] ^= 1
    assert compare_ranks.checksum(values) != compare_ranks.checksum(other)


def break_down(module: GenerativeModule) -> None:
    raise RuntimeError("the disk is gone")


def test_the_error_of_another_rank_is_the_cause(common, tmp_path):
    ranks = pair(tmp_path / "run", common, on_rank(1, 3, break_down))
    since = time.monotonic()
    assert finished(ranks) == [1, 1]
    assert time.monotonic() - since < 30
    result = read_json(tmp_path / "run" / "result.json")
    assert (result["status"], result["error"]) == ("failed", "rank 1: RuntimeError: the disk is gone")
    assert ranks[0].output.strip().splitlines()[-1].endswith("rank 1: RuntimeError: the disk is gone")


def test_a_rank_that_fails_before_the_training_is_the_cause(common, tmp_path):
    def inject() -> None:
        if os.environ["RANK"] == "1":
            command.training_source = lambda *_: break_down(None)

    ranks = pair(tmp_path / "run", [*common, "trainer.strategy.timeout.minutes=0.1"], inject)
    assert finished(ranks) == [1, 1], ranks[0].output
    assert read_json(tmp_path / "run" / "result.json")["error"] == "rank 1: RuntimeError: the disk is gone"


def test_a_rank_that_hangs_ends_the_others(common, tmp_path):
    """It does not even hear signals; rank 0 says so after the time that was set."""
    folder, marker = tmp_path / "run", tmp_path / "marker"

    def hang(module: GenerativeModule) -> None:
        marker.touch()
        os.kill(os.getpid(), signal.SIGSTOP)

    ranks = pair(folder, [*common, "trainer.strategy.timeout.minutes=0.05"], on_rank(1, 3, hang))
    wait_for(marker, ranks)
    since = time.monotonic()
    try:
        assert ranks[0].wait(30) == 1
        assert time.monotonic() - since < 20
        assert "gone or silent" in read_json(folder / "result.json")["error"]
    finally:
        ranks[1].end()


@pytest.mark.slow
def test_a_killed_rank_ends_the_first_one_by_the_launcher(common, tmp_path):
    """And the first one, when it is killed, the others."""
    folder = tmp_path / "run"
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", f"run_dir={folder}", "max_steps=100000"]
    start = [sys.executable, "src/train.py", *common, *ddp, "trainer.log_every_n_steps=10"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(start, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    this, deadline = psutil.Process(process.pid), time.monotonic() + 120
    while not (folder / "metrics.csv").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    (child,) = this.children()
    child.kill()
    assert process.wait(30) == 1, (tmp_path / "log").read_text()
    assert read_json(folder / "result.json")["error"] == "rank 1: it was ended by SIGKILL"

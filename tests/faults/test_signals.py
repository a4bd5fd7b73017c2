"""Whatever a training is doing when a signal comes: saved once, 128 + the signal as exit code, within ten seconds."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ditune.commands import train as command
from ditune.files.atomic import read_json
from ditune.generation import generator
from ditune.training.module import GenerativeModule
from helpers import ROOT, SMALL, assert_same_bits, checkpoint
from trials import Trial, finished, pair, wait_for

STEPS = 6
LONG = 60.0  # seconds: what takes so long does not end by itself in time
TOO_LATE = 10.0  # seconds after a signal


def slow_step(marker: Path, seconds: float) -> Callable[[], None]:
    """Every step takes so long; the marker says that the second one has begun."""

    def inject() -> None:
        original = GenerativeModule.micro_step

        def micro_step(module: GenerativeModule, batch: tuple) -> tuple:
            if module.step_of(batch):
                marker.touch()
                time.sleep(seconds)
            return original(module, batch)

        GenerativeModule.micro_step = micro_step

    return inject


def slow_sheet(marker: Path, number: int) -> Callable[[], None]:
    """Of the sample grids, this one takes steps without end."""

    def inject() -> None:
        original, calls = generator.sample, []

        def sample(*args: object, on_step: Callable, **kwargs: object) -> object:
            calls.append(0)
            if len(calls) == number:
                marker.touch()
                for _ in range(int(LONG / 0.1)):
                    time.sleep(0.1)
                    on_step()
            return original(*args, on_step=on_step, **kwargs)

        generator.sample = sample

    return inject


def slow_call(name: str) -> Callable[[Path], Callable[[], None]]:
    """A function of the command takes long."""

    def fault(marker: Path) -> Callable[[], None]:
        def wait(*_: object) -> None:
            marker.touch()
            time.sleep(LONG)

        return lambda: setattr(command, name, wait)

    return fault


MOMENTS = {  # fault, signal, step that is saved; None = there is nothing to save
    "encoding": (slow_call("training_source"), signal.SIGHUP, None),
    "first sheet": (lambda marker: slow_sheet(marker, 1), signal.SIGUSR1, None),
    "step": (lambda marker: slow_step(marker, 1.5), signal.SIGINT, 2),
    "later sheet": (lambda marker: slow_sheet(marker, 2), signal.SIGTERM, 2),
    "evaluation": (slow_call("denoising"), signal.SIGUSR1, STEPS),
}


@pytest.fixture
def common(pictures: Path) -> list[str]:
    return [*SMALL, f"data.root={pictures}", "peft=full", f"max_steps={STEPS}", "callbacks.samples.every_n_steps=2"]


def assert_stopped(trials: list[Trial], number: int, folder: Path, step: int | None, since: float) -> None:
    codes = finished(trials)
    seconds = time.monotonic() - since
    assert codes == [128 + number] * len(trials), "\n".join(t.output for t in trials)
    assert seconds < TOO_LATE
    saved = [path.name for path in (folder / "checkpoints").glob("*.ckpt")]
    assert saved == ([] if step is None else [f"step_{step:08d}.ckpt"])
    if (folder / "result.json").exists():
        assert read_json(folder / "result.json")["status"] == "stopped"
    assert "Traceback" not in trials[0].output


@pytest.mark.parametrize("moment", MOMENTS)
def test_one_process(common, tmp_path, moment):
    fault, number, step = MOMENTS[moment]
    folder, marker = tmp_path / "run", tmp_path / "marker"
    trial = Trial(folder, common, fault(marker))
    wait_for(marker, [trial])
    since = time.monotonic()
    trial.send(number)
    assert_stopped([trial], number, folder, step, since)


def test_the_same_command_goes_on_to_the_same_bits(common, tmp_path):
    """As Slurm does it with --signal=USR1 and --requeue: the grid that was given up is there in the end, too."""
    whole, stopped, marker = tmp_path / "whole", tmp_path / "stopped", tmp_path / "marker"
    again = [*common, "resume=auto", f"callbacks.checkpoint.every_n_steps={STEPS}"]
    assert finished([Trial(whole, again)]) == [0]
    trial = Trial(stopped, again, slow_sheet(marker, 2))
    wait_for(marker, [trial])
    trial.send(signal.SIGUSR1)
    assert finished([trial]) == [128 + signal.SIGUSR1]
    assert finished([Trial(stopped, again)]) == [0]
    for part in ("state_dict", "ema", "optimizer_states", "lr_schedulers"):
        assert_same_bits(checkpoint(stopped)[part], checkpoint(whole)[part], part)
    for name in ("network.safetensors", "metrics.csv", *(f"samples/step_{k:07d}.png" for k in range(0, STEPS + 1, 2))):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_second_signal_ends_it_at_once(common, tmp_path):
    folder, marker = tmp_path / "run", tmp_path / "marker"
    trial = Trial(folder, common, slow_step(marker, LONG))
    wait_for(marker, [trial])
    trial.send(signal.SIGTERM)
    time.sleep(2.5)  # signals that come at once are one
    since = time.monotonic()
    trial.send(signal.SIGTERM)
    assert finished([trial]) == [128 + signal.SIGTERM]
    assert time.monotonic() - since < 2
    result = read_json(folder / "result.json")
    assert (result["status"], "second signal" in result["error"]) == ("stopped", True)


@pytest.mark.ddp
@pytest.mark.parametrize("moment", ["first sheet", "step", "later sheet"])
def test_two_ranks_of_which_one_hears_it(common, tmp_path, moment):
    """The second one, which waits for the first in C++ while it draws a sheet."""
    fault, number, step = MOMENTS[moment]
    folder, marker = tmp_path / "run", tmp_path / "marker"
    trials = pair(folder, common, fault(marker))
    wait_for(marker, trials)
    time.sleep(0.5)
    since = time.monotonic()
    trials[1].send(number)
    codes = finished(trials)
    assert codes == [128 + number] * 2, "\n".join(t.output for t in trials)
    assert time.monotonic() - since < TOO_LATE
    saved = {path.name for path in (folder / "checkpoints").glob("*.ckpt")}
    assert saved <= {"step_00000002.ckpt", "step_00000003.ckpt"}
    assert bool(saved) == (step is not None)
    assert read_json(folder / "result.json")["status"] == "stopped"


@pytest.mark.ddp
@pytest.mark.slow
def test_no_rank_outlives_a_start_that_is_stopped(common, tmp_path):
    """By the launcher of trainer=ddp: the second rank still imports when the signal comes."""
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", f"run_dir={tmp_path / 'run'}"]
    start = [sys.executable, "src/train.py", *common, *ddp]
    process = subprocess.Popen(start, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True, env=dict(os.environ))
    this, deadline = psutil.Process(process.pid), time.monotonic() + 90
    while not (children := this.children()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    since = time.monotonic()
    process.send_signal(signal.SIGTERM)
    try:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, errors.decode()
        assert children
        _, alive = psutil.wait_procs(children, timeout=max(0.0, TOO_LATE - (time.monotonic() - since)))
        assert not alive
    finally:
        for child in children:
            if child.is_running():
                child.kill()


@pytest.mark.parametrize(("arguments", "code"), [("last=True", 128 + signal.SIGTERM), ("", -signal.SIGTERM)])
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_that_another_rank_passes_back_changes_no_exit_code(number, arguments, code):
    program = f"""
import signal, sys
from ditune.stopping import listen
try:
    with listen({arguments}):
        signal.raise_signal(signal.{number})
finally:
    signal.raise_signal(signal.{number})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if number == "SIGINT":
        code = 128 + signal.SIGINT if arguments else -signal.SIGINT
        assert ("KeyboardInterrupt" in done.stderr) == (not arguments)
    assert done.returncode == code, done.stderr

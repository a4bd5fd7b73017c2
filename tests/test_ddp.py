"""Two gloo processes learn what one process learns with the same global batch, stopped in between or not."""

import json
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, SMALL, assert_same_bits, checkpoint, compose
from safetensors.torch import load_file
from torch.testing import assert_close

from ditune.training import train


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_learn_as_one(tmp_path, pictures):
    common = [*SMALL, f"data.root={pictures}", "peft=full", "name=pair", "max_steps=4", "optimizer.lr=1e-3"]
    alone = tmp_path / "alone"
    assert train(compose(alone, *common)) == 0

    logs = tmp_path / "logs"
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", f"paths.log_dir={logs}"]
    command = [sys.executable, "src/train.py", *common, *ddp]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    folders = list((logs / "train" / "runs").iterdir())
    assert len(folders) == 1  # the second process writes into the first one's
    together = folders[0]
    assert json.loads((together / "result.json").read_text())["status"] == "finished"
    assert len(list(together.glob("config.yaml"))) == len(list(together.glob("metrics.csv"))) == 1

    one, two = (load_file(folder / "network.safetensors") for folder in (alone, together))
    assert one.keys() == two.keys()
    for name, value in one.items():
        if name.endswith("qkv.bias"):
            continue  # softmax cancels a third of it: its gradient is rounding, which Adam blows up to whole steps
        assert_close(two[name], value, atol=1e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_stopped_by_a_signal_and_resumed(tmp_path, pictures):
    """SIGTERM reaches only the process that was started, as from a scheduler; both stop after the same step."""
    steps = 150
    command = [sys.executable, "src/train.py", *SMALL, f"data.root={pictures}", "peft=full", f"max_steps={steps}"]
    command += ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "optimizer.lr=1e-3"]
    command += [f"callbacks.checkpoint.every_n_steps={steps}"]

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = subprocess.run([*command, f"run_dir={whole}"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr

    process = subprocess.Popen([*command, f"run_dir={stopped}"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    csv, deadline = stopped / "metrics.csv", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if csv.is_file() and csv.read_text().count("\n") > 5:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.01)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert 0 < checkpoint(stopped)["global_step"] < steps

    command += [f"run_dir={stopped}", "resume=auto"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    a, b = checkpoint(stopped), checkpoint(whole)
    assert a["global_step"] == b["global_step"] == steps
    for part in ("state_dict", "ema", "optimizer_states", "lr_schedulers"):
        assert_same_bits(a[part], b[part], part)
    assert csv.read_text() == (whole / "metrics.csv").read_text()

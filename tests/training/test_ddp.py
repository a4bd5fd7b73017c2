"""Two gloo processes learn what one process learns with the same global batch, stopped in between or not."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.testing import assert_close

from ditune.commands.train import train
from ditune.training import GenerativeModule
from ditune.training.callbacks import StopOnSignal
from helpers import ROOT, SMALL, SMALL_FLOW, assert_same_bits, checkpoint, compose
from trials import finished, pair


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


FEW_STEPS = ("shortcut", "mean_flow", "alpha_flow", "so_flow", "live_reflow", "consistency_training")
TAUGHT = ("progressive_distillation", "consistency_distillation")


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_learn_as_one_by_every_objective_and_with_experts(tmp_path, pictures):
    """Jvp, teachers, averages and experts under DistributedDataParallel, with the environment of torchrun."""
    common = [
        *SMALL_FLOW[:-1],
        f"data.root={pictures}",
        "peft=full",
        "max_steps=7",
        "optimizer.lr=1e-3",
        "batch_size=8",
    ]
    flow = tmp_path / "flow"
    assert train(compose(flow, *common, "objective=flow_matching")) == 0
    cases = {name: [f"objective={name}"] for name in FEW_STEPS}
    cases |= {name: [f"objective={name}", f"pretrained={flow}/network.safetensors"] for name in TAUGHT}
    # hard masks are made once, of equal weights: rounding can turn none over
    taught = ["sparsity=n_m", "sparsity.way=hard", "sparsity.teacher=0.1", f"pretrained={flow}/network.safetensors"]
    cases["dense_teacher"] = ["objective=flow_matching", *taught]
    of_time = ["objective=flow_matching", "peft=tlora", f"pretrained={flow}/network.safetensors"]
    cases["tlora"] = [*of_time, "gradient_checkpointing=true"]  # masks of this process's own samples
    cases["experts"] = ["model=dit_moe", "network=tiny_moe", "balance=global"]
    for name, case in cases.items():
        trials = pair(tmp_path / f"{name}_2", [*common, *case])
        assert train(compose(tmp_path / f"{name}_1", *common, *case)) == 0
        assert finished(trials, 120) == [0, 0], trials[0].output[-3000:]
        written = "adapter/adapter_model" if name in (*TAUGHT, "dense_teacher", "tlora") else "network"
        one, two = (load_file(tmp_path / f"{name}_{n}" / f"{written}.safetensors") for n in (1, 2))
        assert one.keys() == two.keys()
        for key, value in one.items():
            if not key.endswith("qkv.bias"):  # see above
                assert_close(two[key], value, atol=2e-5, rtol=0, msg=lambda m, at=(name, key): f"{at}: {m}")
    for more in (["max_steps=3"], ["resume=auto"]):  # and on to the end
        trials = pair(tmp_path / "tlora_resumed", [*common, *cases["tlora"], *more])
        assert finished(trials, 120) == [0, 0], trials[0].output[-3000:]
    resumed, never_stopped = (checkpoint(tmp_path / name) for name in ("tlora_resumed", "tlora_2"))
    assert resumed["global_step"] == 7
    for part in ("state_dict", "ema", "optimizer_states", "method"):
        assert_same_bits(resumed[part], never_stopped[part], part)


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_stopped_by_a_signal_and_resumed(tmp_path, pictures):
    """SIGTERM reaches only the process that was started, as from a scheduler; both stop after the same step."""
    steps = 150
    settings = [*SMALL, f"data.root={pictures}", "peft=full", f"max_steps={steps}", "optimizer.lr=1e-3"]
    settings += [f"callbacks.checkpoint.every_n_steps={steps}"]

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    trials = pair(whole, settings)
    assert finished(trials, 120) == [0, 0], trials[0].output[-3000:]

    command = [sys.executable, "src/train.py", *settings, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command += [f"run_dir={stopped}"]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    csv, deadline = stopped / "metrics.csv", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if csv.is_file() and csv.read_text().count("\n") > 5:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.01)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert 0 < checkpoint(stopped)["global_step"] < steps

    trials = pair(stopped, [*settings, "resume=auto"])  # as another launcher goes on with it
    assert finished(trials, 120) == [0, 0], trials[0].output[-3000:]
    a, b = checkpoint(stopped), checkpoint(whole)
    assert a["global_step"] == b["global_step"] == steps
    for part in ("state_dict", "ema", "optimizer_states", "lr_schedulers"):
        assert_same_bits(a[part], b[part], part)
    assert csv.read_text() == (whole / "metrics.csv").read_text()


def test_only_what_trains_is_reduced_in_one_bucket(tmp_path, pictures, base, monkeypatch):
    """Bytes that the processes exchange in each step, counted where they are handed over."""
    buckets: list[list[int]] = []

    def count(_, bucket):
        buckets[-1].append(bucket.buffer().nbytes)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def on_train_start(self, trainer, module):
        start(self, trainer, module)
        trainer.strategy.model.register_comm_hook(None, count)

    def training_step(self, *arguments):
        buckets.append([])
        return step(self, *arguments)

    start, step = StopOnSignal.on_train_start, GenerativeModule.training_step
    monkeypatch.setattr(StopOnSignal, "on_train_start", on_train_start)
    monkeypatch.setattr(GenerativeModule, "training_step", training_step)
    common = [*SMALL, f"data.root={pictures}", "peft=difffit", f"pretrained={base}", "max_steps=4"]
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=1"]
    try:
        assert train(compose(tmp_path / "run", *common, *ddp)) == 0
    finally:
        dist.destroy_process_group()
    trained = json.loads((tmp_path / "run" / "result.json").read_text())["parameters"]["trainable"]
    assert buckets == [[4 * trained]] * 4

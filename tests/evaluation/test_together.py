"""Ranks that evaluate together: one that dies ends the others, and the values are those of one process to the bit."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ditune.commands.evaluate import evaluate
from ditune.commands.prepare import held_out_images
from ditune.commands.train import train
from ditune.config.components import build_components
from ditune.errors import UserError
from ditune.evaluation.denoising_loss import HeldOutLoss, images_at_once
from ditune.evaluation.held_out import EncodedHeldOut
from ditune.evaluation.shared_files import Ranks, SharedFiles
from ditune.files.atomic import read_json
from ditune.metrics import Judge
from ditune.networks import build_network
from ditune.run import load_run
from helpers import ROOT, SMALL, compose, task
from trials import finished, pair

HOLDER = """
import sys, time
from pathlib import Path
from ditune.files.locks import locked
with locked(Path(sys.argv[1])):
    print("there", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def second_of_two(monkeypatch, tmp_path):
    """This process is rank 1; rank 0 is another process, which does nothing."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    command = [sys.executable, "-c", HOLDER, str(tmp_path / ".rank_0.lock")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    yield process
    process.kill()
    process.wait()


def test_a_rank_that_dies_ends_those_that_wait_for_it(second_of_two, tmp_path, monkeypatch):
    ranks, waits = Ranks(tmp_path, 1), []
    files = SharedFiles(tmp_path / "files", 4, ranks)
    for i in files.missing():
        files.make(i, lambda i=i: np.full(2, i))
    assert [i for i in range(4) if files.path(i).exists()] == [1, 3]
    files.wait([3])  # nobody is asked for what is there

    def sleep(_: float) -> None:
        waits.append(0)
        if len(waits) == 3:
            second_of_two.kill()
            second_of_two.wait()

    monkeypatch.setattr("ditune.evaluation.shared_files.time.sleep", sleep)
    with pytest.raises(UserError, match="Process 0 of 2 has ended before its share"):
        files.wait()
    assert len(waits) == 3
    with pytest.raises(UserError, match="Process 0 of 2 has ended before its share"):
        files.make(1, lambda: pytest.fail("in vain"))
    np.save(files.path(0), np.zeros(2))
    np.save(files.path(2), np.zeros(2))
    files.wait()  # it has ended after its last file


def test_a_rank_that_never_comes_is_waited_for_so_long(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks = Ranks(tmp_path, 0)
    assert ranks.ended([0, 1]) == []
    monkeypatch.setattr("ditune.evaluation.shared_files.START", 0.0)
    assert ranks.ended([0, 1]) == [1]
    monkeypatch.undo()
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks.all_are_there()
    assert ranks.ended([0, 1]) == [1]


def test_ranks_share_the_features_of_a_reference(tmp_path, monkeypatch):
    class Mean(torch.nn.Module):
        name, identity, columns = "mean", {"extractor": "mean"}, {"features": slice(None)}

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            assert len(images) == 2  # padded
            return images.float().mean((2, 3))

    class Images:
        fingerprint, images = "x", torch.randint(256, (21, 3, 4, 4), dtype=torch.uint8)

        def __len__(self) -> int:
            return 21

        def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            return self.images[indices], torch.zeros(len(indices))

    alone = Judge(Mean(), tmp_path / "alone", batch_size=2).reference(Images())
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert torch.equal(Judge(Mean(), tmp_path / "together", batch_size=2).reference(Images()), alone)
    assert [path.name for path in (tmp_path / "together").iterdir() if path.name != ".lock"] == [
        path.name for path in (tmp_path / "alone").iterdir()
    ]


def test_longer_sequences_are_passed_in_smaller_batches():
    with torch.device("meta"):
        networks = {side: build_network("dit_xl_2", input_size=side, num_classes=3, in_channels=4) for side in (32, 64)}
    assert {side: images_at_once(network) for side, network in networks.items()} == {32: 128, 64: 32}


def test_a_run_without_metrics_names_the_command_for_later(small, tmp_path, caplog):
    caplog.set_level("INFO")
    assert train(small("peft=full", "max_steps=1")) == 0
    command = rf"python src/evaluate.py run={re.escape(str(tmp_path))}/run metrics_of=this metrics=\w+ processes=\d"
    assert re.search(command, caplog.text), caplog.text  # which metrics: another test of this process may have said
    assert "denoising" in read_json(tmp_path / "run" / "result.json")
    assert not (tmp_path / "run" / "evaluation").exists()


def shards(folder: Path) -> int:
    return len(list((folder / "evaluation").glob("*/??????.npy")))


def started(command: list[str], folder: Path, more: int) -> subprocess.Popen:
    """The command once it has generated `more` files of images than there were."""
    before, deadline = shards(folder), time.monotonic() + 200
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while shards(folder) < before + more:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


def children(process: subprocess.Popen) -> list[int]:
    """Its ranks: they run the same script."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in found if b"src/train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def has_ended(pid: int) -> bool:
    path = Path(f"/proc/{pid}/stat")
    return not path.exists() or path.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
def test_two_ranks_evaluate_as_one_process_killed_stopped_and_gone_on_with(tmp_path, pictures, base, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = tmp_path / "run"
    settings = [*SMALL, f"data.root={pictures}", f"pretrained={base}", "peft=difffit", "max_steps=2", "metrics.n=13"]
    settings += [
        "sampler.steps=40",
        "callbacks.samples.n=0",
        "metrics.base_reference=${data.pictures}",
        f"paths.cache_dir={tmp_path}/cache",
    ]
    command = [sys.executable, "src/train.py", *settings, f"run_dir={run}", "resume=auto"]
    command += ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]

    process = started(command, run, more=2)
    (other,) = children(process)
    os.kill(other, signal.SIGKILL)
    at = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert time.monotonic() - at < 30
    assert "Process 1 of 2 has ended before its share" in output
    assert read_json(run / "result.json")["status"] == "failed"
    assert (run / "adapter").is_dir()

    process = started(command, run, more=2)  # only evaluates, and goes on with the images that are there
    (other,) = children(process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Error" not in output
    assert has_ended(other)
    assert read_json(run / "result.json")["status"] == "stopped"
    kept = shards(run)

    trials = pair(run, [*settings, "resume=auto"])
    assert finished(trials, 240) == [0, 0], trials[0].output[-3000:]
    assert 4 <= kept < 14  # of the network and its base
    assert not (run / "evaluation").exists()
    result = read_json(run / "result.json")
    assert result["status"] == "finished"

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        metrics = read_json(evaluate(task("evaluate", f"run={run}")))["metrics"]
        for name in ("before", "after", "base_domain"):
            assert metrics[name] == result["metrics"][name], name
        parts = build_components(cfg := compose(tmp_path / "other", *settings))
        source = EncodedHeldOut(held_out_images(cfg), parts.autoencoder)
        loss = HeldOutLoss(parts.objective, source, cfg.metrics.seed, bf16=False)
        assert loss(load_run(run).network) == result["denoising"]["after"]
    finally:
        torch.set_num_threads(threads)

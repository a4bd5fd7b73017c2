"""A training that is stopped anywhere and resumed ends with the same bits as one that never stopped."""

import os
import signal
from pathlib import Path

import pytest
import torch
from comparison import assert_same_end
from injectors import crash, cut, during_training_step, flip_a_bit, terminate
from omegaconf import OmegaConf

from ditune.checkpoints import read_header
from ditune.commands.train import train
from ditune.errors import UserError
from ditune.files.atomic import atomic, read_json, remove_leftovers
from ditune.training.checkpoint_io import AtomicCheckpointIO
from helpers import checkpoint, movement

STEPS = 7  # of 4 pictures each; a pass over the ten pictures ends within step 3
STOPPED = 128 + signal.SIGTERM
CASES = {
    "full": ["peft=full"],
    "workers": ["peft=full", "data.num_workers=2"],
    "difffit_bf16_accumulated": [
        "peft=difffit",
        "pretrained=@base",
        "trainer.precision=bf16-mixed",
        "trainer.accumulate_grad_batches=2",
        "scheduler=linear",
        "scheduler.warmup_steps=3",
    ],
    "tlora_recomputed": ["peft=tlora", "pretrained=@base", "gradient_checkpointing=true", "optimizer.lr=0.01"],
}


@pytest.fixture
def run(small, base, tmp_path):
    """`run(name, *overrides)` trains in the folder `name` and returns folder and exit code."""

    def start(name: str, *overrides: str, steps: int = STEPS) -> tuple[Path, int]:
        filled = [o.replace("@base", str(base)) for o in overrides]
        cfg = small(
            f"max_steps={steps}", f"callbacks.checkpoint.every_n_steps={STEPS}", *filled, folder=tmp_path / name
        )
        return tmp_path / name, train(cfg)

    return start


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("call", [4, 5])
def test_stopped_by_a_signal_and_resumed(run, monkeypatch, case, call):
    overrides = CASES[case]
    whole, code = run("whole", *overrides)
    assert code == 0
    with monkeypatch.context() as patch:
        during_training_step(patch, call, terminate)
        stopped, code = run("stopped", *overrides)
    assert code == STOPPED
    micro_steps = 2 if "accumulated" in case else 1
    assert checkpoint(stopped)["global_step"] == -(-call // micro_steps)  # the step at hand is finished
    assert run("stopped", *overrides, "resume=auto") == (stopped, 0)
    assert_same_end(stopped, whole, STEPS)
    if "pretrained=@base" in overrides:
        assert movement(OmegaConf.load(whole / "config.yaml"), whole) > 1e-3


def test_crashed_and_resumed_twice(run, monkeypatch):
    whole, _ = run("whole", "peft=full")
    every = "callbacks.checkpoint.every_n_steps=2"
    for call, overrides in ((4, []), (3, ["resume=auto"])):  # in step 4; from step 2 on, in step 5
        with monkeypatch.context() as patch:
            during_training_step(patch, call, crash)
            with pytest.raises(RuntimeError, match="the machine fails"):
                run("crashed", "peft=full", every, *overrides)
    crashed, code = run("crashed", "peft=full", "resume=auto")
    assert code == 0
    assert_same_end(crashed, whole, STEPS)


def test_a_longer_training_goes_on_from_a_shorter_one(run):
    whole, _ = run("whole", "peft=full")
    shorter, _ = run("shorter", "peft=full", "callbacks.checkpoint.every_n_steps=3", steps=3)
    run("shorter", "peft=full", "resume=auto")
    assert_same_end(shorter, whole, STEPS)


def test_resuming_a_finished_run_changes_no_weight(run):
    whole, _ = run("whole", "peft=full")
    before = (whole / "network.safetensors").read_bytes()
    assert run("whole", "peft=full", "resume=auto")[1] == 0
    assert (whole / "network.safetensors").read_bytes() == before


@pytest.mark.parametrize("resume", [[], ["resume=auto"]])
def test_a_finished_run_without_checkpoints_is_not_run_over(run, resume):
    folder, _ = run("done", "peft=full", steps=2)
    (folder / "checkpoints" / "step_00000002.ckpt").unlink()
    before = (folder / "result.json").read_bytes()
    with pytest.raises(UserError, match="holds a finished run"):
        run("done", "peft=full", *resume)
    assert (folder / "result.json").read_bytes() == before


def test_stopped_by_a_signal_while_it_is_judged(run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("ditune.commands.train.denoising", lambda *_: terminate())
        folder, code = run("run", "peft=full")
    assert code == STOPPED
    assert read_json(folder / "result.json")["status"] == "stopped"
    assert (folder / "network.safetensors").is_file()
    before = (folder / "network.safetensors").read_bytes()
    assert run("run", "peft=full", "resume=auto") == (folder, 0)
    assert read_json(folder / "result.json")["status"] == "finished"
    assert (folder / "network.safetensors").read_bytes() == before


def test_fewer_steps_than_a_run_has_behind_it_are_refused(run):
    folder, _ = run("run", "peft=full", "callbacks.checkpoint.every_n_steps=2", steps=4)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=r"the run is at step 4 already; max_steps=2 lies before it.*Set max_steps=4"):
        run("run", "peft=full", "resume=auto", steps=2)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert run("run", "peft=full", "resume=auto", steps=4)[1] == 0
    assert read_json(folder / "result.json")["steps"] == 4
    assert read_header(folder / "network.safetensors")["provenance"]["steps"] == 4


def test_resume_without_a_checkpoint_starts_the_run(run):
    assert run("fresh", "peft=full", "resume=auto")[1] == 0


# Damage and mistakes


@pytest.fixture
def two_checkpoints(run):
    """A run with the checkpoints of the steps 4 and 6, stopped there."""
    folder, _ = run("run", "peft=full", "callbacks.checkpoint.every_n_steps=2", steps=6)
    return folder, sorted((folder / "checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize("damage", [flip_a_bit, cut])
def test_damaged_newest_checkpoint_falls_back(run, two_checkpoints, damage, caplog):
    folder, paths = two_checkpoints
    assert [path.name for path in paths] == ["step_00000004.ckpt", "step_00000006.ckpt"]
    whole, _ = run("whole", "peft=full")
    damage(paths[-1])
    run("run", "peft=full", "resume=auto")
    assert "step_00000006.ckpt is damaged" in caplog.text
    assert_same_end(folder, whole, STEPS)


def test_only_damaged_checkpoints_are_an_error(run, two_checkpoints):
    for path in two_checkpoints[1]:
        cut(path)
    with pytest.raises(UserError, match="All checkpoints"):
        run("run", "peft=full", "resume=auto")


def test_a_finished_run_is_not_trained_over(run, two_checkpoints):
    with pytest.raises(UserError, match=r"holds a finished run of 6 steps\. Set max_steps=<more>"):
        run("run", "peft=full", steps=6)
    with pytest.raises(UserError, match="holds a run, and resume=never"):
        run("run", "peft=full", "resume=never")


def test_the_same_command_goes_on_with_an_unfinished_run(run, monkeypatch):
    whole, _ = run("whole", "peft=full")
    with monkeypatch.context() as patch:
        during_training_step(patch, 4, terminate)
        stopped, code = run("stopped", "peft=full")
    assert code == STOPPED
    assert run("stopped", "peft=full") == (stopped, 0)
    assert_same_end(stopped, whole, STEPS)


@pytest.mark.parametrize(
    "other", ["seed=1", "batch_size=2", "peft=bitfit", "network.pos_embed_scale=0.5", "optimizer.lr=0.5"]
)
def test_checkpoint_of_another_run_is_refused(run, two_checkpoints, other):
    overrides = ["peft=full", "resume=auto"] if other != "peft=bitfit" else ["pretrained=@base", "resume=auto"]
    with pytest.raises(UserError, match="another run"):
        run("run", *overrides, other)


def test_checkpoints_hold_plain_values_of_what_trains_only(run):
    folder, _ = run("run", "peft=bitfit", "pretrained=@base")
    saved = checkpoint(folder)  # by weights_only=True
    assert all("bias" in name or "y_embedder" in name for name in saved["state_dict"])
    assert {f"network.{name}" for name in saved["ema"]} == set(saved["state_dict"])
    assert saved["identity"]["peft"]["name"] == "bitfit"


def test_a_save_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    path, files = tmp_path / "step_00000001.ckpt", AtomicCheckpointIO()
    files.save_checkpoint({"value": torch.ones(1000)}, path)
    before = path.read_bytes()

    def dies(content, target):
        Path(target).write_bytes(before[:500])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        files.save_checkpoint({"value": torch.zeros(1000)}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_killed_while_it_saves_leaves_the_old_file(tmp_path):
    """SIGKILL leaves no time to clean up: the half file stays beside the whole one, and the next start removes it."""
    path, files = tmp_path / "step_00000001.ckpt", AtomicCheckpointIO()
    files.save_checkpoint({"value": torch.ones(1000)}, path)
    child = os.fork()
    if child == 0:
        torch.save = lambda content, target: (Path(target).write_bytes(b"half"), os.kill(os.getpid(), signal.SIGKILL))
        files.save_checkpoint({"value": torch.zeros(1000)}, path)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = tmp_path.glob(".*")
    assert left.name.endswith(f"-{child}")
    content = files.load_checkpoint(path)
    with atomic(tmp_path / "other") as at_work:
        at_work.touch()
        remove_leftovers(tmp_path)
        assert at_work.exists()  # its writer is this process
    assert not list(tmp_path.glob(".*"))
    assert torch.equal(content["value"], torch.ones(1000))

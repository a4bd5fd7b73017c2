"""Kills, restarts and other settings: no line of the log is lost, and what changes the result is refused or said."""

import pytest
import torch
from comparison import assert_same_end, logged, saved
from injectors import crash, cut, during_training_step, foreign_zip, in_a_process, kill, result_of

from ditune.commands import train
from ditune.errors import UserError
from ditune.training.callbacks import SampleGrids
from ditune.training.checkpoint_io import AtomicCheckpointIO

EXPERTS = ["network=tiny_moe", "balance=batch", "callbacks.routing.every_n_steps=5"]


@pytest.mark.parametrize("moment", ["while", "behind"])
def test_a_kill_at_a_checkpoint_loses_no_line(tmp_path, start, whole, moment):
    """Of 4, while it is written or right after it."""
    run, save = tmp_path / "run", AtomicCheckpointIO.save_checkpoint

    def deadly(files, content, path, storage_options=None):
        if content["global_step"] == 4 and moment == "while":
            torch.save = lambda content, target: (target.write_bytes(b"half"), kill())
        save(files, content, path, storage_options)
        if content["global_step"] == 4:
            kill()

    def killed():
        AtomicCheckpointIO.save_checkpoint = deadly
        start(run)

    assert in_a_process(killed) == -9
    assert result_of(run)["status"] == "running"
    assert len(list(run.rglob(".*.tmp-*"))) == (moment == "while")
    assert start(run) == 0
    assert not list(run.rglob(".*.tmp-*"))
    assert_same_end(run, whole, 7)


def test_a_kill_before_the_last_sample_grid_loses_none(tmp_path, start, whole):
    """No step is left to train then."""
    run = tmp_path / "run"

    def killed():
        SampleGrids.on_train_end = lambda *_: kill()
        start(run)

    assert in_a_process(killed) == -9
    assert saved(run, 7)["global_step"] == 7
    assert start(run) == 0
    assert_same_end(run, whole, 7)
    assert (run / "samples/before_after.png").read_bytes() == (whole / "samples/before_after.png").read_bytes()


def test_statistics_of_the_routing_survive_and_other_micro_batches_are_refused(tmp_path, start, monkeypatch):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert start(whole, *EXPERTS) == 0
    with monkeypatch.context() as patch:
        during_training_step(patch, 4, crash)
        with pytest.raises(RuntimeError, match="the machine fails"):
            start(run, *EXPERTS)
    with pytest.raises(UserError, match=r"began in micro-batches of 4 images, and would go on in .* of 2 images"):
        start(run, *EXPERTS, "trainer.accumulate_grad_batches=2")
    assert start(run, *EXPERTS) == 0
    assert_same_end(run, whole, 7)
    assert result_of(run)["routing"] == result_of(whole)["routing"]
    assert any("routing/cv" in line for line in logged(run))
    assert start(run, *EXPERTS, "resume=auto") == 0  # evaluated again, without a step
    assert result_of(run)["routing"] == result_of(whole)["routing"]


def test_a_longer_training_of_a_decaying_rate_is_said(stopped, start, caplog):
    with pytest.raises(UserError, match=r"scheduler.decay_to \(1.0 there, 0.5 now\)"):
        start(stopped, "scheduler.decay_to=0.5")
    assert "schedule has changed" not in caplog.text
    run = stopped.parent / "decaying"
    assert start(run, "scheduler.decay_to=0.5", "max_steps=2") == 0
    assert start(run, "scheduler.decay_to=0.5", "max_steps=3") == 0
    assert "the schedule has changed with max_steps: the learning rate at step 2 was 5e-05, and is" in caplog.text


BEST = ["callbacks.held_out.every_n_steps=2", "callbacks.checkpoint.best=loss"]


@pytest.mark.parametrize("damage", [cut, foreign_zip, lambda path: torch.save([1], path)])
def test_best_weights_that_are_damaged_are_none(tmp_path, start, monkeypatch, caplog, damage):
    """Before they are taken, and when the run goes on."""
    run, take = tmp_path / "run", train.take_weights

    def struck(*of):
        damage(run / "checkpoints" / "best.pt")
        return take(*of)

    with monkeypatch.context() as patch:
        patch.setattr(train, "take_weights", struck)
        assert start(run, *BEST, "max_steps=2") == 0
    assert "there are no best weights by val/loss: the last are saved and evaluated" in caplog.text
    assert result_of(run)["evaluated"] == {"checkpoint": "last", "step": 2}
    assert start(run, *BEST, "max_steps=3") == 0
    assert "best weights are those from here on" in caplog.text

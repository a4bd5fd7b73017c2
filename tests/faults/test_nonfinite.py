"""A loss or gradient that is not finite: who says what, and what a skipped step leaves as it was."""

from pathlib import Path

import pytest
import torch

from ditune.commands.train import train
from ditune.errors import UserError
from ditune.files.atomic import read_json
from helpers import SMALL, assert_same_bits, compose
from trials import finished, pair, poison

STEP, BATCH = 2, 4  # of the bad step; images in a step
BAD = STEP * BATCH + 3  # position: of two ranks it is the second one's
PARTS = ("state_dict", "ema", "optimizer_states", "balance")


@pytest.fixture
def common(pictures: Path) -> list[str]:
    save = ["callbacks.checkpoint.every_n_steps=1", "callbacks.checkpoint.keep=-1"]
    return [*SMALL, f"data.root={pictures}", "peft=full", "max_steps=4", "callbacks.samples.n=0", *save]


def saved(folder: Path, step: int) -> dict:
    return torch.load(folder / "checkpoints" / f"step_{step:08d}.ckpt", weights_only=True)


def test_it_stops_with_rank_image_and_tensor(common, tmp_path, monkeypatch):
    poison(monkeypatch, BAD)
    told = rf"not finite at step {STEP}; .*the gradient of .*rank 0: position {BAD} \(train/\w+/\d+\.png\)"
    with pytest.raises(UserError, match=told):
        train(compose(tmp_path / "run", *common))
    assert read_json(tmp_path / "run" / "result.json")["status"] == "failed"


@pytest.mark.parametrize("case", [["trainer.accumulate_grad_batches=2"], ["network=tiny_moe", "balance=loss_free"]])
def test_a_skipped_step_changes_nothing(common, tmp_path, monkeypatch, case):
    poison(monkeypatch, BAD)
    assert train(compose(tmp_path / "run", *common, *case, "callbacks.nonfinite.action=skip")) == 0
    before, after, later = (saved(tmp_path / "run", STEP + k) for k in (0, 1, 2))
    for part in PARTS:
        assert_same_bits(after[part], before[part], part)
    assert (after["skipped"], later["skipped"]) == (1, 0)
    assert not torch.equal(*(next(iter(c["state_dict"].values())) for c in (after, later)))


def test_too_many_skipped_steps_stop_it(common, tmp_path, monkeypatch):
    poison(monkeypatch, *range(BATCH, 4 * BATCH))
    skip = ["callbacks.nonfinite.action=skip", "callbacks.nonfinite.limit=2"]
    with pytest.raises(UserError, match=r"not finite at step 3; .*3 steps in a row"):
        train(compose(tmp_path / "run", *common, *skip))


@pytest.mark.ddp
def test_two_ranks_skip_together(common, tmp_path, monkeypatch):
    poison(monkeypatch, BAD)
    folder = tmp_path / "run"
    ranks = pair(folder, [*common, "callbacks.nonfinite.action=skip", "callbacks.ranks.compare_every_n_steps=1"])
    assert finished(ranks) == [0, 0], ranks[0].output
    for part in PARTS:
        assert_same_bits(saved(folder, STEP + 1)[part], saved(folder, STEP)[part], part)
    assert f"losses that are not finite are of images at rank 1: position {BAD} (train/" in ranks[0].output

"""Checkpoints in shares: what goes in comes out, nothing is executed, and damage is found."""

import errno
import pickle
import shutil
from collections import namedtuple
from datetime import timedelta

import pytest
import torch

from ditune.errors import UserError
from ditune.training import checkpoint_io
from ditune.training.checkpoint_io import AtomicCheckpointIO, checkpoints_in, unreadable
from ditune.training.sharded_checkpoint import Unusable, leftovers, read, read_facts, whole_or_not_there, write
from ditune.training.sharding import Sharded
from helpers import assert_same_bits

CONTENT = {
    "global_step": 6,
    "epoch": 0,
    "pytorch-lightning_version": "2.6.0",
    "loops": {
        "fit_loop": {
            "epoch_loop.batch_progress": {"total": {"ready": 6}, "current": {"ready": 6}},
            "epoch_loop.state_dict": {"_batches_that_stepped": 6},
        }
    },
    "callbacks": {"Routing{'a': 1}": {"sums": torch.arange(6, dtype=torch.float64).view(2, 3) / 7}},
    "state_dict": {"network.a/b": torch.tensor([[1.0, 2.0], [3.0, 4.5]]), "network.c": torch.tensor([0.1])},
    "ema": {"a": torch.tensor([1 / 3, -2e-30])},
    "teacher": {},
    "method": {"places": torch.tensor([3, 5]), "half": torch.tensor([1.5, 2.5], dtype=torch.bfloat16)},
    "balance": {"on": torch.tensor([True, False])},
    "identity": {"precision": "32-true", "betas": (0.9, 0.999), "none": None, "$odd": [1, float("inf")]},
    "optimizer_states": [{"state": {0: {"step": torch.tensor(6.0)}, 1: {"exp_avg": torch.zeros(0, 4)}}}],
    "lr_schedulers": [{"_last_lr": [1e-3]}],
}


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "step_00000006.ckpt"
    path.mkdir()
    write(CONTENT, path)
    return path


def test_what_goes_in_comes_out_and_nothing_is_executed(folder, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a pickle is read")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    content = read(folder)
    assert_same_bits(content, CONTENT)
    assert type(content["identity"]["betas"]) is tuple
    assert list(content["optimizer_states"][0]["state"]) == [0, 1]
    facts = read_facts(folder)
    assert facts["state_dict"]["network.a/b"].is_meta
    assert facts["state_dict"]["network.a/b"].shape == (2, 2)
    assert unreadable(folder) is None


def test_every_damage_is_found(folder, tmp_path):
    files = sorted(folder.iterdir())
    assert [file.suffix for file in files] == [".json", ".safetensors"]
    for file in files:
        whole = file.read_bytes()
        for place in range(0, len(whole), 97):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(Unusable, match=r"damaged|another format"):
                read_facts(folder)
        file.write_bytes(whole[:-1])
        with pytest.raises(Unusable, match="damaged"):
            read_facts(folder)
        file.unlink()
        with pytest.raises(Unusable, match=f"{file.name} is missing"):
            read_facts(folder)
        assert "is damaged" in unreadable(folder)
        file.write_bytes(whole)
    read_facts(folder)
    (tmp_path / "empty.ckpt").mkdir()
    with pytest.raises(Unusable, match="missing"):
        read_facts(tmp_path / "empty.ckpt")


def test_a_folder_is_whole_or_not_there(folder):
    def begin():
        with whole_or_not_there(folder) as half:
            (half / "shard.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin()
    assert_same_bits(read(folder), CONTENT)  # the one of before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    half = folder.with_name(f".{folder.name}.partial")  # what a kill leaves
    half.mkdir()
    assert leftovers(folder.parent) == [half]
    with whole_or_not_there(folder) as fresh:
        write(CONTENT | {"global_step": 7}, fresh)
    assert read(folder)["global_step"] == 7
    assert not leftovers(folder.parent)


def test_old_ones_go_and_a_full_disk_is_said(tmp_path, monkeypatch, caplog):
    strategy = Sharded(timedelta(minutes=1))
    strategy.checkpoint_io = AtomicCheckpointIO(keep=2)
    for step in (2, 4, 6):
        strategy.save_checkpoint(CONTENT | {"global_step": step}, tmp_path / f"step_{step:08d}.ckpt")
    kept = ["step_00000006.ckpt", "step_00000004.ckpt"]
    assert [path.name for path in checkpoints_in(tmp_path)] == kept
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 90, 10))
    with pytest.raises(UserError, match=r"needs .* and 0\.0 MB are free"):
        strategy.save_checkpoint(CONTENT, tmp_path / "step_00000008.ckpt")
    strategy.save_checkpoint(CONTENT, tmp_path / "step_00000008.ckpt", checkpoint_io.CONTINUE)
    assert "it is left out, and the training goes on" in caplog.text
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ditune.training.sharding.write", full)
    with pytest.raises(UserError, match="are free"):
        strategy.save_checkpoint(CONTENT, tmp_path / "step_00000008.ckpt")
    assert [path.name for path in checkpoints_in(tmp_path)] == kept
    assert not leftovers(tmp_path)

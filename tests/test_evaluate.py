"""Evaluation on disk: shared by processes, stopped and gone on with, written for ADM's evaluator."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, SMALL, compose
from torch import nn

from ditune.blocks import Blocks, NpzPictures, weights_hash
from ditune.checkpoints import write_json
from ditune.errors import UserError
from ditune.metrics import Judge
from ditune.training import train


def picture(i: int) -> torch.Tensor:
    return torch.full((3, 4, 4), i, dtype=torch.uint8)


def drawing(calls: list[int]):
    def draw(numbers: list[int]) -> torch.Tensor:
        calls.extend(numbers)
        return torch.stack([picture(i) for i in numbers])

    return draw


def blocks(folder: Path, n: int = 7, **header: object) -> Blocks:
    return Blocks(folder, header, torch.arange(n) % 3, size=3)


def test_blocks_are_drawn_once_and_read_in_any_order(tmp_path):
    calls: list[int] = []
    blocks(tmp_path, a=1).draw(drawing(calls))
    assert calls == list(range(7))
    (tmp_path / "000001.npy").unlink()  # a process was stopped in it
    (tmp_path / ".000001.npy.tmp-1").write_bytes(b"half")
    calls.clear()
    again = blocks(tmp_path, a=1)
    again.draw(drawing(calls))
    assert calls == [3, 4, 5]
    pictures, labels = again.__getitems__([6, 0, 4])
    assert torch.equal(pictures, torch.stack([picture(i) for i in (6, 0, 4)]))
    assert labels.tolist() == [0, 0, 1]
    with pytest.raises(UserError, match="drawn otherwise"):
        blocks(tmp_path, a=2)


def test_ranks_share_the_blocks(tmp_path, monkeypatch):
    calls: list[int] = []
    monkeypatch.setattr("ditune.blocks.time.sleep", lambda _: pytest.fail("nothing is left to wait for"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(pytest.fail.Exception):  # it waits for the other one
        blocks(tmp_path).draw(drawing(calls))
    assert calls == [3, 4, 5]
    monkeypatch.setenv("RANK", "0")
    blocks(tmp_path).draw(drawing(calls))
    assert sorted(calls) == list(range(7))


def test_npz_is_what_adm_reads(tmp_path):
    drawn = blocks(tmp_path / "blocks")
    drawn.draw(drawing([]))
    drawn.save_npz(tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        assert file["arr_0"].shape == (7, 4, 4, 3)
        assert file["arr_0"].dtype == np.uint8
        assert (file["arr_0"][:, 0, 0, 0] == np.arange(7)).all()
        assert file["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    read = NpzPictures(tmp_path / "samples.npz")
    assert torch.equal(read.__getitems__([5, 2])[0], torch.stack([picture(5), picture(2)]))
    drawn.delete()
    assert not (tmp_path / "blocks").exists()


def test_other_npz_files_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(UserError, match="no file"):
        NpzPictures(path)
    path.write_bytes(b"no zip")
    with pytest.raises(UserError, match="cannot be read"):
        NpzPictures(path)
    for content in ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, {"arr_0": np.zeros((2, 4, 4, 3))}):
        np.savez(path, **content)
        with pytest.raises(UserError, match="arr_0 in"):
            NpzPictures(path)
    np.savez(path, arr_0=np.array([print], dtype=object))  # a pickle, which is not executed
    with pytest.raises(UserError, match="cannot be read"):
        NpzPictures(path)


def test_hash_sees_every_weight():
    network = nn.Linear(2, 2)
    before = weights_hash(network)
    assert weights_hash(network) == before
    with torch.no_grad():
        network.bias[1] += 1
    assert weights_hash(network) != before


def test_too_few_pictures_and_small_sets(caplog):
    class Tiny(nn.Module):
        name, identity, columns = "tiny", {}, {"features": slice(None)}

    x, y = torch.randn(3, 8), torch.randn(20, 8)
    with pytest.raises(UserError, match="Draw more"):
        Judge(Tiny()).compare(x, y)
    Judge(Tiny()).compare(torch.randn(8, 8), y)
    assert "biased" in caplog.text


@pytest.mark.ddp
@pytest.mark.slow
def test_one_and_four_processes_give_the_same(tmp_path, pictures):
    run = tmp_path / "run"
    settings = [*SMALL, f"data.root={pictures}", "peft=full", "max_steps=1", "metrics.n=9", "sampler.batch_size=2"]
    assert train(compose(run, *settings, f"paths.cache_dir={tmp_path}/cache")) == 0
    found = []
    for processes in (1, 4):
        write_json(run / "result.json", {"status": "finished"})
        command = [sys.executable, "src/evaluate.py", f"run={run}", f"processes={processes}", "threads=1"]
        command.append(f"out={tmp_path}/out")
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "images/s" in done.stdout
        assert "kid_efflite0" in done.stdout
        with np.load(run / "samples.npz", allow_pickle=False) as file:
            found.append((file["arr_0"], json.loads((run / "result.json").read_text())["metrics"]["after"]))
        assert not (run / "evaluation").exists()
    (one, metrics), (four, others) = found
    assert len(one) == 9
    np.testing.assert_array_equal(one, four)
    assert metrics == pytest.approx(others, abs=1e-9)

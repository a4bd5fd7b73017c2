"""Checkpoints that are damaged, foreign, gone or too old: no traceback, and no start from the beginning in silence."""

import shutil
from pathlib import Path

import pytest
import torch
from comparison import assert_same_end, logged
from injectors import changed, cut, flip_a_bit, foreign_zip, malicious, result_of
from omegaconf import OmegaConf

from ditune.config.training import kept_checkpoints
from ditune.errors import UserError
from ditune.training.checkpoint_io import AtomicCheckpointIO, checkpoints_in

TABLE = "network.y_embedder.embedding_table.weight"


def wide(content: dict) -> None:
    content["state_dict"][TABLE] = torch.zeros(9, 9)


def without_ema(content: dict) -> None:
    del content["ema"][next(iter(content["ema"]))]


def nan(content: dict) -> None:
    content["state_dict"][TABLE][0, 0] = float("nan")


def other_moments(content: dict) -> None:
    content["optimizer_states"][0]["state"][0]["exp_avg"] = torch.zeros(3)


# damage of a checkpoint, and why it is rejected
DAMAGES = {
    "flipped": (flip_a_bit, "is damaged"),
    "cut": (cut, "is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "text": (lambda path: path.write_text("nothing"), "is damaged"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "is damaged"),
    "legacy": (lambda path: torch.save({}, path, _use_new_zipfile_serialization=False), "is damaged"),
    "zip": (foreign_zip, "is none of ours"),
    "pickle": (malicious, "is none of ours (UnpicklingError)"),
    "list": (changed(lambda content: [content]), "it holds a list"),
    "dict": (changed(lambda content: {"weights": content["state_dict"]}), "it lacks global_step"),
    "loops": (changed(lambda content: content["loops"].clear()), "it lacks 'fit_loop'"),
    "shapes": (changed(wide), "trained parameters of another shape: y_embedder"),
    "names": (changed(lambda content: content["state_dict"].__delitem__(TABLE)), "lacks trained parameters: y_embed"),
    "ema": (changed(without_ema), "lacks their average (EMA)"),
    "nan": (changed(nan), "not finite"),
    "no optimizer": (changed(lambda content: content["optimizer_states"].clear()), "lacks the state of the optimizer"),
    "empty optimizer": (
        changed(lambda content: content["optimizer_states"][0]["state"].clear()),
        "has an empty optimizer state",
    ),
    "moments": (changed(other_moments), "optimizer state of other shapes"),
    "seed": (changed(lambda content: content["identity"].update(seed=5)), "another run: seed (5 there, 0 now)"),
}


def add(folder: Path, step: int, damage) -> Path:
    """A damaged checkpoint of a later step."""
    path = folder / "checkpoints" / f"step_{step:08d}.ckpt"
    shutil.copy(folder / "checkpoints" / "step_00000006.ckpt", path)
    changed(lambda content: content.update(global_step=step))(path)
    damage(path)
    return path


def test_damaged_and_foreign_ones_are_rejected_with_a_reason_and_the_newest_valid_one_is_taken(
    stopped, whole, start, caplog
):
    paths = {name: add(stopped, 100 + k, damage) for k, (name, (damage, _)) in enumerate(DAMAGES.items())}
    other_name = stopped / "checkpoints" / "step_00000999.ckpt"
    shutil.copy(stopped / "checkpoints" / "step_00000004.ckpt", other_name)
    (stopped / "checkpoints" / "mine.ckpt").write_text("a note")
    assert start(stopped) == 0
    for name, (_, reason) in DAMAGES.items():
        lines = [line for line in caplog.messages if paths[name].name in line]
        assert len(lines) == 1, name
        assert reason in lines[0], lines
        assert "weights_only" not in lines[0]
    assert any("step_00000999.ckpt is of step 4" in line for line in caplog.messages)
    assert not list(stopped.rglob("*.executed"))
    assert_same_end(stopped, whole, 7)


def test_without_a_valid_one_the_run_does_not_begin_anew(stopped, start):
    for path in checkpoints_in(stopped / "checkpoints"):
        changed(lambda content: content["optimizer_states"].clear())(path)
    before = (stopped / "result.json").read_bytes()
    with pytest.raises(UserError, match=r"All checkpoints in .* are unusable: step_00000006.ckpt lacks the state"):
        start(stopped)
    assert (stopped / "result.json").read_bytes() == before


@pytest.mark.parametrize("resume", [[], ["resume=auto"]])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(stopped, start, resume):
    shutil.rmtree(stopped / "checkpoints")
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"was at step 6, and its checkpoints are gone\. Copy one back"):
        start(stopped, *resume)
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_damaged_side_files_are_set_aside(stopped, whole, start, caplog):
    """And what is left over of processes that are gone is removed; only the newest checkpoints stay."""
    result, table = stopped / "result.json", stopped / "metrics.csv"
    result.write_text(result.read_text()[:50])
    table.write_bytes(table.read_bytes()[:40] + b"\xff\xfe" + table.read_bytes()[42:])
    cut(stopped / "samples" / "step_0000000.png")
    left = [stopped / ".metrics.csv.tmp-4194304", stopped / "samples" / ".a.png.tmp-4194304"]
    for path in left:
        path.write_text("half")
    assert start(stopped, "callbacks.checkpoint.keep=1") == 0
    assert_same_end(stopped, whole, 7, log=False)
    assert [row["step"] for row in logged(stopped)] == ["6"]
    assert sorted(path.name for path in stopped.rglob("*.damaged")) == [
        "metrics.csv.damaged",
        "result.json.damaged",
        "step_0000000.png.damaged",
    ]
    assert result_of(stopped)["status"] == "finished"
    assert not any(path.exists() for path in left)
    assert [path.name for path in checkpoints_in(stopped / "checkpoints")] == [
        "step_00000007.ckpt",
        "step_00000006.ckpt",
    ]
    assert "keep=1 is raised to 2" in caplog.text


def test_two_valid_ones_stay_beside_damaged_ones(stopped):
    """By the files that are there: what an earlier process has written counts, what is damaged does not."""
    folder = stopped / "checkpoints"
    cut(folder / "step_00000006.ckpt")
    content = torch.load(folder / "step_00000004.ckpt", weights_only=True)
    files = AtomicCheckpointIO(keep=2)
    names = {8: [8, 6, 4], 10: [10, 8], 12: [12, 10]}
    for step, expected in names.items():
        files.save_checkpoint(content | {"global_step": step}, folder / f"step_{step:08d}.ckpt")
        assert checkpoints_in(folder) == [folder / f"step_{step:08d}.ckpt" for step in expected]


@pytest.mark.parametrize(("keep", "kept"), [(0, 2), (1, 2), (2, 2), (5, 5), (-1, -1)])
def test_never_fewer_than_two_are_kept(keep, kept):
    assert kept_checkpoints(OmegaConf.create({"keep": keep, "every_n_steps": 1})) == kept


def test_a_refusal_names_the_keys_that_differ(stopped, start):
    other = ["optimizer.lr=0.5", "objective.process.prediction=v"]
    with pytest.raises(UserError) as refused:
        start(stopped, *other)
    text = str(refused.value)
    assert text.startswith("The checkpoint is of another run: optimizer.lr (0.0001 there, 0.5 now), ")
    assert "objective.process.prediction (x0 there, v now). Resume with" in text

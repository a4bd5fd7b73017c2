"""Disks that are full, read-only or refuse a file: a sentence, a true result.json, and the same bits afterwards."""

import logging
import resource
from contextlib import contextmanager

import pytest
from comparison import assert_same_end
from injectors import during_training_step, fill, read_only_over, result_of, small_disk

from ditune.cli import reported
from ditune.errors import UserError
from ditune.files import spared
from ditune.files.spared import LogFile
from ditune.training.checkpoint_io import checkpoints_in
from ditune.training.loggers.tensorboard import SparedTensorBoard


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", "16m") as folder:
        yield folder


@pytest.fixture(autouse=True)
def _nothing_said_yet(monkeypatch):
    monkeypatch.setattr(spared, "_said", set())


def steps_saved(run):
    return [int(path.stem.split("_")[1]) for path in checkpoints_in(run / "checkpoints")]


@contextmanager
def largest_file(size):
    """The system refuses larger files, as a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("left", [0, 300_000])
def test_a_full_disk_stops_the_training_and_loses_nothing(disk, start, whole, monkeypatch, caplog, left):
    run = disk / "run"
    with monkeypatch.context() as patch:
        during_training_step(patch, 5, lambda: fill(disk, left) and None)
        with pytest.raises(UserError) as refused:
            start(run)
    text = str(refused.value)
    assert text.startswith(f"{run}/checkpoints/step_00000006.ckpt needs 0.9 MB, and 0.{3 if left else 0} MB are free. ")
    assert "Free some space, or move the run folder to another disk; resume=auto goes on from the checkpoint" in text
    assert result_of(run)["status"] == "failed"
    assert result_of(run)["error"] == text
    assert steps_saved(run) == [4, 2]
    assert not list(run.rglob(".*.tmp-*"))
    assert len([line for line in caplog.messages if "metrics.csv cannot be written" in line]) == (0 if left else 1)
    (disk / "others").unlink()
    assert start(run) == 0
    assert_same_end(run, whole, 7)


def test_a_training_goes_on_where_that_is_asked_for(disk, start, whole, monkeypatch, caplog):
    """From the fifth step to the seventh the disk is full; lines of the log are written once it is not."""
    run = disk / "run"
    act = {5: lambda: fill(disk) and None, 7: lambda: (disk / "others").unlink()}
    with monkeypatch.context() as patch:
        for call, fault in act.items():
            during_training_step(patch, call, fault)
        assert start(run, "callbacks.checkpoint.on_full=continue", "callbacks.samples.every_n_steps=3") == 0
    assert "step_00000006.ckpt needs 0.9 MB, and 0.0 MB are free: it is left out" in caplog.text
    assert "sample grids cannot be written (No space left on device); the training goes on" in caplog.text
    assert steps_saved(run) == [7, 4]
    assert_same_end(run, whole, 7)
    assert result_of(run)["status"] == "finished"


def test_a_disk_that_is_full_from_the_start_is_a_sentence(disk, start, capsys):
    fill(disk)
    with pytest.raises(SystemExit) as end:
        reported(lambda: start(disk / "run"), traceback=False)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "cannot be used: the disk is full, 0.0 MB are free. Free some space, or choose another place" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("place", ["checkpoints", "."])
def test_a_folder_that_becomes_read_only(disk, start, whole, monkeypatch, caplog, place):
    run = disk / "run"
    with read_only_over(run / place) as lay, monkeypatch.context() as patch:
        during_training_step(patch, 5, lay)
        with pytest.raises(
            UserError, match=r"step_00000006.ckpt cannot be written: the file system is read-only \(it "
        ):
            start(run)
        assert ("result.json cannot be written (Read-only file system): it does not" in caplog.text) == (place == ".")
    assert result_of(run)["status"] == ("running" if place == "." else "failed")
    assert start(run) == 0
    assert_same_end(run, whole, 7)


def test_a_file_that_the_system_refuses(tmp_path, start, whole):
    """No disk can be mounted everywhere; a limit on the size of files can be set."""
    run = tmp_path / "run"
    with (
        largest_file(500_000),
        pytest.raises(UserError, match=r"step_00000002.ckpt cannot be written: the file is larger"),
    ):
        start(run)
    assert result_of(run)["status"] == "failed"
    assert not list(run.rglob(".*.tmp-*"))
    assert start(run) == 0
    assert_same_end(run, whole, 7)


def test_a_log_file_on_a_full_disk_says_it_once(disk, capsys):
    handler = LogFile(disk / "train.log")
    fill(disk)
    for k in range(3):
        handler.emit(logging.makeLogRecord({"msg": f"{k}" * 10_000}))
    error = capsys.readouterr().err
    assert error.count("train.log cannot be written (No space left on device)") == 1
    assert "Traceback" not in error


def test_tensorboard_on_a_full_disk_says_it_once(disk, caplog):
    logger = SparedTensorBoard(str(disk))
    logger.log_metrics({"a": 1.0}, 0)
    fill(disk)
    for step in range(3):
        logger.log_metrics({"a": 1.0}, step)
        logger.save()
    logger.finalize("success")
    assert caplog.text.count("TensorBoard's events cannot be written") == 1

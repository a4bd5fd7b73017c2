"""Faults, as hardware, systems and people cause them."""

import json
import multiprocessing
import os
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ditune.training import GenerativeModule


def during_training_step(monkeypatch, call: int, act) -> None:
    """Let `act` happen in the `call`-th forward of the training, counted from 1."""
    original, calls = GenerativeModule.training_step, iter(range(1, 1000))

    def training_step(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        return act() or loss if next(calls) == call else loss

    monkeypatch.setattr(GenerativeModule, "training_step", training_step)


def terminate() -> None:
    """As Ctrl-C and schedulers do it: the signal reaches every process of the run, those that load pictures too."""
    workers = multiprocessing.active_children()
    processes = (*(worker.pid for worker in workers), os.getpid())
    subprocess.run(["kill", "-TERM", *map(str, processes)], check=True)  # not by this process, whom workers obey
    time.sleep(0.5 if workers else 0)
    assert len(multiprocessing.active_children()) == len(workers)  # torch kills the run when one of them dies


def crash() -> None:
    raise RuntimeError("the machine fails")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A damage: the file of torch.save is whole, and its content has been changed."""

    def damage(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        torch.save(change(content) or content, path)

    return damage


def foreign_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing of ours")


class RunsCode:
    """What a pickle of it would do when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.touch, (self.mark,)


def malicious(path: Path) -> None:
    torch.save({"state_dict": RunsCode(path.with_suffix(".executed"))}, path)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, which can be full or read-only; skips the test where it may not be made."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, left: int = 0) -> Path:
    """Fill a disk but for `left` bytes; the file that does it."""
    path, stats = disk / "others", os.statvfs(disk)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, stats.f_bavail * stats.f_frsize - left))
    return path


@contextmanager
def read_only_over(folder: Path) -> Iterator[Callable[[], None]]:
    """A function that lays an empty read-only file system over the folder, until the block ends."""

    def lay() -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=16m", "tmpfs", str(folder)], check=True)

    try:
        yield lay
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def in_a_process(work: Callable[[], Any]) -> int:
    """Exit code of a forked process that does the work; it may kill itself. -9 = by SIGKILL."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # threads are not forked
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())

"""Work that any number of processes share through a folder, on one machine or several: no process has to know others.

A lock is an flock, which the system takes back when its process dies, however it dies.
"""

import fcntl
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

POLL = 0.2  # seconds between two looks at what others are doing


@contextmanager
def attempt(path: Path) -> Iterator[bool]:
    """True while this process holds the lock `path`; False when another one does, or its folder has gone."""
    try:
        file = path.open("a")
    except FileNotFoundError:
        yield False
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock `path`, after waiting for those who hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is at it; waiting for %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def share(folder: Path, count: int, work: Callable[[int], None], finished: Callable[[], bool]) -> None:
    """Do the pieces 0 .. count-1 that no other process does, and return when all are done.

    A piece is done once `<folder>/<i>.done` is there; `work(i)` must have written its results to disk before.
    Pieces of a process that has died are taken up by the others.

    Args:
        finished: True once the result of the whole work stands (the folder may be gone then).
    """
    folder.mkdir(parents=True, exist_ok=True)
    pending = list(range(count))
    while pending and not finished():
        waiting = []
        for i in pending:
            done = folder / f"{i}.done"
            if done.exists():
                continue
            with attempt(folder / f"{i}.lock") as mine:
                if mine and not done.exists():
                    work(i)
                    done.touch()
                elif not mine:
                    waiting.append(i)
        pending = waiting
        if pending:
            time.sleep(POLL)

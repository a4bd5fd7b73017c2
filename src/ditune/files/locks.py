"""Work that any number of processes share through a folder, on one machine or several: no process has to know others.

A lock is an flock, which the system takes back when its process dies, however it dies.
"""

import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO
from weakref import WeakSet

from filelock import lock_descriptor

from ditune.errors import UserError

log = logging.getLogger(__name__)

POLL = 0.2  # seconds between two looks at what others are doing
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_kept: dict[Path, ExitStack] = {}  # what `keep` holds until this process ends
_files: WeakSet[IO[str]] = WeakSet()  # of locks


@contextmanager
def attempt(path: Path) -> Iterator[bool]:
    """True while this process holds the lock `path`; False when another one does, or its folder has gone.

    Raises:
        UserError: the file system has no locks.
    """
    try:
        opened = _opened(path)
    except FileNotFoundError:
        yield False
        return
    with opened as file:
        yield _lock(file)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock `path`, after waiting for those who hold it.

    Raises:
        UserError: the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _opened(path) as file:
        if not _lock(file):
            log.info("waiting for %s, which holds %s", holder(path), path)
            while not _lock(file):
                time.sleep(POLL)
        yield


@contextmanager
def alone(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Hold the lock `path`; no other process may be at it, but this one may hold it already.

    Args:
        what: the work, as the refusal names it: "Another sweep".
        remedy: what to do when another process is at it.

    Raises:
        UserError: another process holds it, or the file system has no locks.
    """
    if path.resolve() in _kept:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with attempt(path) as mine:
        if not mine:
            raise UserError(f"{what} is running in {path.parent} ({holder(path)}). {remedy}")
        yield


def keep(path: Path, what: str, remedy: str) -> None:
    """Hold the lock `path` as `alone` does, until this process ends.

    Raises:
        UserError: another process holds it, or the file system has no locks.
    """
    held = ExitStack()
    held.enter_context(alone(path, what, remedy))
    _kept.setdefault(path.resolve(), held)


def holder(path: Path) -> str:
    """The process that has taken the lock `path` last."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") or "another process"
    except OSError:  # it may be readable for its owner only
        return "another process"


def _opened(path: Path) -> IO[str]:
    file = path.open("a+", encoding="utf-8")
    _files.add(file)
    return file


def _let_go() -> None:
    """A forked process, such as one that loads pictures, must not hold its parent's locks when that has died."""
    for file in list(_files):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _lock(file: IO[str]) -> bool:
    """Whether the lock is this process's now, which it then signs."""
    try:
        mine = lock_descriptor(file.fileno(), blocking=False)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        raise UserError(
            f"The file system of {file.name} has no locks ({error.strerror}), which keep two processes from writing "
            "the same files. Choose a folder on another disk."
        ) from error
    if mine:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return mine


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

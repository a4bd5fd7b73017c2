"""Locks, and work that any number of processes share through a folder, on one machine or several.

A lock is an flock, which the system releases whenever its process ends or dies.
"""

import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO
from weakref import WeakSet

from filelock import lock_descriptor

from ditune.errors import UserError

log = logging.getLogger(__name__)

POLL = 0.2  # seconds between two looks at what others are doing
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

_kept: dict[Path, ExitStack] = {}  # held by `keep` until this process ends
_files: WeakSet[IO[str]] = WeakSet()  # lock files that are open


@contextmanager
def attempt(path: Path) -> Iterator[bool]:
    """Yield whether this process holds the lock; False if another one does, or its folder no longer exists.

    Args:
        path: the lock.

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
    """Hold the lock, after waiting for the process that holds it.

    Args:
        path: the lock; its folder is created if missing.

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
    """Hold the lock, or refuse; this process may hold it already.

    Args:
        path: the lock; its folder is created if missing.
        what: the work of another holder, as the refusal names it: "Another sweep".
        remedy: sentence that says what to do then.

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
    """Hold the lock until this process ends; arguments as in `alone`.

    Raises:
        UserError: another process holds it, or the file system has no locks.
    """
    held = ExitStack()
    held.enter_context(alone(path, what, remedy))
    _kept.setdefault(path.resolve(), held)


def holder(path: Path) -> str:
    """Name of the process that has taken the lock last, for messages."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") or "another process"
    except OSError:  # it may be readable for its owner only
        return "another process"


def _opened(path: Path) -> IO[str]:
    file = path.open("a+", encoding="utf-8")
    _files.add(file)
    return file


def _let_go() -> None:
    """Close the locks in a forked process: a worker that loads images must not hold them when its parent has died."""
    for file in list(_files):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _lock(file: IO[str]) -> bool:
    """Try to take the lock, and sign it; whether this process has it now."""
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
        with suppress(OSError):  # a full disk: the lock is held all the same, only without its holder's name
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    return mine


def share(folder: Path, count: int, work: Callable[[int], None], finished: Callable[[], bool]) -> None:
    """Share pieces of work 0 .. count-1 with other processes; return when all are done.

    A piece is done once `<folder>/<i>.done` exists; `work(i)` must have written its results to disk before. The others
    take over the pieces of a process that has died.

    Args:
        folder: same for all processes; created if missing.
        count: number of pieces.
        work: does one piece.
        finished: whether the result of the whole work exists (the folder may be gone then).

    Raises:
        UserError: the file system has no locks.
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

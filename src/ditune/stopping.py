"""How this process ends when a signal comes: at once where nothing can be lost, else at the work's next look.

Python runs its signal handlers between two of its own instructions, so not while a process waits in C++ for another
one. The system writes the numbers of signals into a pipe besides, and a thread reads them at any moment.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, s) for s in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, s))
SAME = 2.0  # seconds in which more signals are the same one: terminals signal all ranks, which pass it on to each other
PARENT = "DITUNE_FIRST_RANK"  # process that has started this one as a further rank
STUCK = 5.0  # seconds that a process may wait in C++ when nothing can be lost


class Stopped(SystemExit):
    """A signal ends this process, with 128 + its number; it is no error."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class Interrupted(Exception):
    """A signal has come, and the work of an `interruptible` block is given up."""


class Signals:
    """The signals that have come to this process.

    Attributes:
        number: of the first one; None = none has come.
        gentle: whether the work looks at `number` itself; otherwise the main thread is interrupted at once.
        children: gives the processes that end with this one, however it ends.
        peers: gives the processes that share the work and must hear of a signal; they may have heard already.
        last_words: called with a reason before the process is ended from outside of its main thread.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.gentle = False
        self.peers: Callable[[], Iterable[int]] = tuple
        self.children: Callable[[], Iterable[int]] = tuple
        self.last_words: Callable[[str], None] = lambda reason: None
        self._heard = False

    def note(self, number: int) -> None:
        """The signal has come; for those that are known from another process, too."""
        if self.number is None:
            self.number = number

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Called by Python in the main thread."""
        self.note(number)
        again, self._heard = self._heard, True
        if not self.gentle and not again:
            raise Stopped(self.number)

    def watch(self, pipe: int) -> None:
        """Read signals until a 0 comes; called in a thread."""
        first = None
        while number := os.read(pipe, 1)[0]:
            if number not in SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
                self.note(number)
                if is_orphan():
                    self.end("the first rank has ended, and so does this one")
                threading.Thread(target=self._first_of, args=(number,), daemon=True).start()
            elif time.monotonic() - first > SAME:
                self.end(f"a second signal, {signal.Signals(number).name}, left no time to save")

    def _first_of(self, number: int) -> None:
        tell(self.peers(), number)
        time.sleep(STUCK)
        if not self.gentle and not self._heard:
            self.end(f"stopped by {signal.Signals(number).name} while it waited for another process")

    def end(self, reason: str, code: int | None = None) -> None:
        """End this process from any thread.

        Args:
            reason: for result.json.
            code: of the process; None = 128 + the signal's number.
        """
        self.last_words(reason)
        tell(self.children(), signal.SIGKILL)
        sys.stderr.write(f"\n{reason}\n")
        sys.stderr.flush()
        os._exit(128 + (self.number or 0) if code is None else code)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Linux sends SIGTERM to this process when the one that has started it dies, even by SIGKILL."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def parent() -> int | None:
    """The first rank, where it has started this process as a further one."""
    return int(os.environ[PARENT]) if PARENT in os.environ else None


def is_orphan() -> bool:
    """Whether the first rank, which has started this one, is gone."""
    return parent() is not None and os.getppid() != parent()


def follow_first_rank() -> None:
    """A further rank ends with the first one: called before anything that takes time."""
    if parent() is not None:
        end_with_parent()
        if is_orphan():  # since before the call above
            sys.exit(128 + signal.SIGTERM)


_current: Signals | None = None
_giving_up = 0  # depth of `interruptible` blocks


def current() -> Signals | None:
    """The signals that this process listens to, None where it does not."""
    return _current


def tell(processes: Iterable[int], number: int) -> None:
    """Send a signal to processes, some of which may be gone."""
    for process in processes:
        try:
            os.kill(process, number)
        except (ProcessLookupError, PermissionError):
            continue  # it has ended, or its number belongs to somebody else by now


@contextmanager
def listen(last: bool = False) -> Iterator[Signals]:
    """Handle signals inside of the block; an inner block of the same process is part of the outer one.

    A handler that somebody else had set (a scheduler's, to start the job anew) is called when the block has ended.

    Args:
        last: the process ends with the block. It then ends with its exit code even if another rank, which has heard
            of a signal from this one, passes the same one back meanwhile.
    """
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield _current or Signals()
        return
    _current = signals = Signals()
    read, write = os.pipe()
    os.set_blocking(write, False)
    watcher = threading.Thread(target=signals.watch, args=(read,), name="signals", daemon=True)
    earlier = {number: signal.signal(number, signals.handle) for number in SIGNALS}
    earlier_pipe = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    watcher.start()
    try:
        yield signals
    finally:
        _current = None
        signal.set_wakeup_fd(earlier_pipe)
        for number, handler in earlier.items():
            usual = handler in (None, signal.SIG_DFL, signal.default_int_handler)
            heard = last and usual and number == signals.number
            signal.signal(number, signal.SIG_IGN if heard else signal.SIG_DFL if handler is None else handler)
        os.write(write, b"\0")  # workers may have copies of the pipe, so closing it would not end the thread
        watcher.join()
        os.close(read)
        os.close(write)
    _pass_on(signals, earlier)


def _pass_on(signals: Signals, earlier: dict[int, Any]) -> None:
    handler = earlier.get(signals.number)
    if callable(handler) and handler is not signal.default_int_handler:
        handler(signals.number, None)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside of the block `check` gives up the work once a signal has come.

    Raises:
        Interrupted: a signal has come. What encloses the block goes on without its result.
    """
    global _giving_up
    _giving_up += 1
    try:
        yield
    finally:
        _giving_up -= 1


def check() -> None:
    """A moment at which work may be given up: between batches, or between two steps of a sampler.

    Raises:
        Interrupted: a signal has come, inside of an `interruptible` block.
    """
    if _giving_up and _current is not None and _current.number is not None:
        raise Interrupted


def _forget() -> None:
    """A forked worker has no watcher, and its signals are not those of this process."""
    global _current
    if _current is not None:
        _current = None
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)

"""Progress of work that takes longer than a moment: a bar in a terminal, a line now and then where there is none.

Without a terminal (pipes, CI, Slurm, Docker) a line comes after every ten seconds, whatever the work is doing, and
after every twentieth of it. Meters may be nested; the innermost one speaks. Ranks other than the first are quiet.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

EVERY = 10.0  # seconds between two lines
SHARES = 20  # a line for each such part of the work, where it takes longer than MOMENT
MOMENT = 3.0  # seconds between two lines at the least

_meters: list["Meter"] = []  # that are at work, the innermost one last
_bars: Progress | None = None  # one display for all of them: rich can show only one


def console(**options: Any) -> Console:
    """A console that prints text as it is: names and messages may hold brackets, which rich takes for markup.

    Args:
        options: of rich's Console.
    """
    return Console(markup=False, emoji=False, highlight=False, **options)


class Meter:
    """Counts what is done of one piece of work.

    Args:
        what: the work, as the line begins: "encoding latents".
        total: how much there is of it; None = unknown.
        unit: of what is counted: "images"; "bytes" are shown as MB.
        done: how much was done by an earlier start.
    """

    def __init__(self, what: str, total: int | None, unit: str, done: int = 0) -> None:
        self.what, self.total, self.unit, self.note = what, total, unit, ""
        self.first = self.done = self.said = done
        self.start = self.said_at = time.monotonic()
        self.lines = 0
        self._pace: float | None = None
        of = "" if total is None else f" of {total:,} {unit}"
        self._task = None if _bars is None else _bars.add_task(what, total=total, completed=done, note="", of=of)

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more are done."""
        self.update(self.done + count, note)

    def update(self, done: int, note: str = "", pace: float | None = None) -> None:
        """`done` in all are done.

        Args:
            note: what else to show, such as the loss.
            pace: units per second, where the caller knows better than the mean since the start.
        """
        self.done, self.note, self._pace = done, note or self.note, pace
        if _bars is not None:
            _bars.update(self._task, completed=done, note=self.note)
            return
        now = time.monotonic()
        due = self.total and done - self.said >= self.total / SHARES and now - self.said_at >= MOMENT
        if due or now - self.said_at >= EVERY:
            self.say()

    @property
    def pace(self) -> float:
        """Units per second."""
        return self._pace or (self.done - self.first) / max(time.monotonic() - self.start, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """At this pace; None where it cannot be known."""
        if self.total is None or self.done == self.first:
            return None
        return max(self.total - self.done, 0) / self.pace

    def say(self) -> None:
        """Log how far the work is, if this is the first rank."""
        if not is_first_rank():
            return
        self.said, self.said_at, self.lines = self.done, time.monotonic(), self.lines + 1
        log.info("%s", str(self))

    def __str__(self) -> str:
        facts = [amount(self.done, self.unit) if self.total is None else self._share()]
        facts += [self.note] if self.note else []
        if self.done > self.first:
            facts.append(f"{amount(self.pace, self.unit)}/s")
        left = self.seconds_left
        facts.append(f"{duration(time.monotonic() - self.start)} so far" if left is None else f"{duration(left)} left")
        return f"{self.what}: {', '.join(facts)}"

    def _share(self) -> str:
        total = amount(self.total, self.unit)
        return f"{amount(self.done, self.unit).removesuffix(f' {self.unit}')} of {total}"


@contextmanager
def meter(what: str, total: int | None = None, unit: str = "images", done: int = 0) -> Iterator[Meter]:
    """Show the progress of the work inside of the block; see `Meter`."""
    global _bars
    outermost = not _meters
    if outermost and is_first_rank() and sys.stdout.isatty():
        _bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:,.0f}{task.fields[of]} {task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            refresh_per_second=2,
            transient=True,
        )
        _bars.start()
    current = Meter(what, total, unit, done)
    _meters.append(current)
    ended = threading.Event()
    speaker = threading.Thread(target=_speak, args=(current, ended), daemon=True)
    if _bars is None and is_first_rank():
        speaker.start()
    try:
        yield current
    finally:
        ended.set()
        if speaker.is_alive():
            speaker.join()
        _meters.remove(current)
        for other in _meters:
            other.said_at = time.monotonic()  # what was said meanwhile was news enough
        if _bars is not None:
            _bars.remove_task(current._task)
            if outermost:
                _bars.stop()
                _bars = None
        elif current.lines:
            log.info("%s: done in %s", what, duration(time.monotonic() - current.start))


def _speak(current: Meter, ended: threading.Event) -> None:
    """A line where the work itself gives no sign for ten seconds."""
    while not ended.wait(1.0):
        if _meters and _meters[-1] is current and time.monotonic() - current.said_at >= EVERY:
            current.say()


def is_first_rank() -> bool:
    """Whether this process speaks for all: torchrun, Slurm and Lightning number the others."""
    numbers = ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
    return not any(int(os.environ.get(name, "0") or 0) for name in numbers)


def amount(count: float, unit: str) -> str:
    """A number with its unit, such as "1,852 images" or "2.7 GB"."""
    if unit == "bytes":
        return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
    return f"{count:,.0f} {unit}" if count >= 10 or count == int(count) else f"{count:.2g} {unit}"


def duration(seconds: float) -> str:
    """Such as "8 s", "3 min 20 s", "2 h 5 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"

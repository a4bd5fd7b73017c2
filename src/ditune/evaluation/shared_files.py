"""Work that the ranks of one command share through a folder: each makes files, and the others read them.

A rank holds a lock until it ends. So another one that waits for its files sees within a second that it has died.
"""

import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import numpy as np
import torch

from ditune.distributed import rank, sum_over_ranks, world_size
from ditune.errors import UserError
from ditune.files.atomic import atomic
from ditune.files.locks import attempt, locked
from ditune.progress import meter

POLL = 0.5  # seconds between two looks for the files of the other ranks
START = 600.0  # seconds that a rank may take until it is there


class Ranks:
    """Which of the ranks that work in a folder have ended. Get one by `ranks_of`.

    Args:
        folder: of the locks, which stay there.
        first: number of this rank.
    """

    def __init__(self, folder: Path, first: int) -> None:
        self.folder, self.own, self._since = folder, first, time.monotonic()
        self._seen: set[int] = set()
        self._held = ExitStack()  # until this process ends
        self._held.enter_context(locked(self._lock(first)))

    def all_are_there(self) -> None:
        """From now on a rank whose lock is free has ended."""
        self._seen.update(range(world_size()))

    def ended(self, ranks: Iterable[int]) -> list[int]:
        """Those that are gone, or have not come in ten minutes."""
        others, found = sorted(set(ranks) - {self.own}), []
        if not others:
            return found
        with locked(self.folder / ".ranks.lock"):  # to try a lock is to hold it for a moment, and means no rank
            for other in others:
                with attempt(self._lock(other)) as free:
                    if not free:
                        self._seen.add(other)
                    elif other in self._seen or time.monotonic() - self._since > START:
                        found.append(other)
        return found

    def _lock(self, number: int) -> Path:
        return self.folder / f".rank_{number}.lock"


@cache
def _ranks(folder: Path, number: int) -> Ranks:
    return Ranks(folder, number)


def ranks_of(folder: Path) -> Ranks | None:
    """The ranks that work in the folder, of which this process is one from now on; None = it is the only one."""
    return None if world_size() == 1 else _ranks(folder.resolve(), rank())


def meet(folder: Path, device: torch.device) -> bool:
    """Let the ranks of a process group begin to share a folder; all of them call it.

    Args:
        folder: that the first rank has made.
        device: of the group's tensors.

    Returns:
        Whether they see the same folder. Machines without a shared disk do not.
    """
    token = folder / ".meeting"
    numbers = torch.zeros(2, dtype=torch.int64, device=device)
    if rank() == 0:
        numbers[0] = uuid.uuid4().int >> 66
        token.write_text(str(numbers[0].item()), encoding="utf-8")
    sum_over_ranks(numbers)
    numbers[1] = token.is_file() and token.read_text(encoding="utf-8") == str(numbers[0].item())
    numbers[0] = 0
    sum_over_ranks(numbers)
    if rank() == 0:
        token.unlink()
    if numbers[1] < world_size():
        return False
    ranks = ranks_of(folder)
    sum_over_ranks(numbers)  # nobody looks for a lock that is not taken yet
    ranks.all_are_there()
    return True


class SharedFiles:
    """Arrays 0..count-1 as files; array i is made by rank i modulo their number.

    Args:
        folder: of the files.
        count: number of arrays.
        ranks: that share them; None = there is only this one.
    """

    def __init__(self, folder: Path, count: int, ranks: Ranks | None) -> None:
        self.folder, self.count, self.ranks = folder, count, ranks

    def path(self, i: int) -> Path:
        """File of array i."""
        return self.folder / f"{i:06d}.npy"

    def missing(self) -> list[int]:
        """Arrays of this rank that an earlier start has not made."""
        return [i for i in range(rank(), self.count, world_size()) if not self.path(i).exists()]

    def make(self, i: int, work: Callable[[], np.ndarray]) -> None:
        """Make array i, completely or not at all.

        Raises:
            UserError: another rank has ended before it made all of its own.
        """
        self._go_on(range(self.count))
        with atomic(self.path(i)) as temporary, temporary.open("wb") as file:
            np.save(file, work())

    def read(self, i: int) -> np.ndarray:
        """Array i, which is there."""
        return np.load(self.path(i), allow_pickle=False)

    def wait(self, arrays: Iterable[int] | None = None) -> None:
        """Wait until arrays are there.

        Args:
            arrays: their numbers; None = all.

        Raises:
            UserError: a rank has ended that should make one.
        """
        wanted = list(range(self.count) if arrays is None else arrays)
        if all(self.path(i).exists() for i in wanted):
            return
        with meter("waiting for the other processes", len(wanted), "files") as progress:
            while missing := self._not_there(wanted):
                progress.update(len(wanted) - len(missing))
                self._go_on(missing)
                time.sleep(POLL)

    def _go_on(self, arrays: Iterable[int]) -> None:
        """Refuse to, where a rank has ended that should make one of the arrays."""
        ended = [] if self.ranks is None else self.ranks.ended(i % world_size() for i in arrays)
        # the files are looked at after the ranks: one that has ended may have made its last file just before
        owed = {i % world_size() for i in self._not_there(i for i in arrays if i % world_size() in ended)}
        if owed:
            raise UserError(
                f"Process {min(owed)} of {world_size()} has ended before its share of the evaluation was done; its own "
                "output says why. Start again (a training with resume=auto): what was generated is kept."
            )

    def _not_there(self, arrays: Iterable[int]) -> list[int]:
        return [i for i in arrays if not self.path(i).exists()]

"""Several processes of one training: how they start, hear of each other's signals and failures, and end together."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch.distributed as dist
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

from ditune.errors import CONSEQUENCE, UserError
from ditune.files.atomic import read_json, write_json
from ditune.stopping import PARENT, Signals, parent, tell

POLL = 0.2  # seconds between two looks at other processes
SETTLE = 10.0  # seconds that this process has to end by itself after another one has failed
GRACE = 3.0  # seconds that another rank has to end, or to say why it has failed


class RankError(RuntimeError):
    """Another rank has failed; says which one and why."""


class Launcher(_SubprocessScriptLauncher):
    """Lightning's launcher, whose processes end with this one and this one with them.

    Lightning's own kills all processes as soon as one ends with a code of its own, also while the first one saves.
    """

    signals: Signals
    folder: Path  # of the run

    def launch(self, function: Callable, *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        """Start the other ranks of this machine, unless somebody else does so, and call the function."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        self._ending = threading.Event()
        if not self.cluster_environment.creates_processes_externally:
            os.environ[PARENT] = str(os.getpid())
            self.signals.peers = self.signals.children = self.alive
            self._call_children_scripts()
            del os.environ[PARENT]
            threading.Thread(target=self._observe, daemon=True, name="ranks").start()
        elif (first := parent()) is not None:
            self.signals.peers = lambda: [first]
        _set_num_threads_if_needed(num_processes=self.num_processes)
        try:
            return function(*args, **kwargs)
        except BaseException:
            self._end()
            raise
        finally:
            self._ending.set()

    def alive(self) -> list[int]:
        """The processes that were started and run."""
        return [process.pid for process in self.procs if process.poll() is None]

    def failed(self) -> dict[int, int]:
        """Exit codes other than 0, by rank."""
        return {rank: code for rank, p in enumerate(self.procs, 1) if (code := p.poll())}

    def _observe(self) -> None:
        """A rank that has failed may leave this process waiting for it in C++."""
        while not self._ending.wait(POLL):
            if self.failed() and self.signals.number is None:
                if not self._ending.wait(SETTLE):
                    said = what_they_said(self.folder, self.failed())
                    self.signals.end(f"Error: {said[0] if said else why_ended(self.failed())}", code=1)
                return

    def _end(self) -> None:
        """No rank outlives the training that it belongs to."""
        tell(self.alive(), signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        while self.alive() and time.monotonic() < deadline:
            time.sleep(POLL / 4)
        tell(self.alive(), signal.SIGKILL)


def why_ended(codes: dict[int, int]) -> str:
    """What exit codes say of ranks."""
    ends = {
        rank: f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with code {code}"
        for rank, code in codes.items()
    }
    return "; ".join(f"rank {rank}: {end}" for rank, end in ends.items())


def join(trainer: pl.Trainer, signals: Signals, folder: Path) -> None:
    """Let the trainer start its ranks by `Launcher`, and leave all signals to `ditune.stopping`.

    Lightning's own handlers broadcast inside of a handler, and its loop broadcasts before every micro-step, which
    waits for a GPU. Checked with pytorch-lightning 2.6.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    launcher = trainer.strategy.launcher
    if type(launcher) is _SubprocessScriptLauncher:
        launcher.__class__, launcher.signals, launcher.folder = Launcher, signals, folder


def introduce(signals: Signals) -> None:
    """Let the ranks on this machine tell each other of signals; called by all ranks."""
    space = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    me = (socket.gethostname(), space, os.getpid())
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, me)
    others = [pid for *place, pid in everybody if tuple(place) == me[:2] and pid != me[2]]
    signals.peers = lambda: others


# What a rank leaves for the first one, which only sees that a connection is gone


def _path(folder: Path, rank: int) -> Path:
    return folder / f".rank_{rank}_failed.json"


@contextmanager
def failures_left(folder: Path) -> Iterator[None]:
    """Write why this rank fails inside of the block, unless it is the first one, or only lost another one."""
    rank = own_rank()
    if not rank:
        yield
        return
    _path(folder, rank).unlink(missing_ok=True)  # of an earlier start
    try:
        yield
    except Exception as error:
        if not isinstance(error, RankError) and not is_consequence(error):
            mistake = isinstance(error, UserError)
            text = str(error) if mistake else f"{type(error).__name__}: {error}"
            write_json(_path(folder, rank), {"error": text, "mistake": mistake})
        raise


def is_consequence(error: BaseException | None) -> bool:
    """Whether an error only says that another rank is gone or silent."""
    return error is not None and CONSEQUENCE.search(str(error)) is not None


def own_rank() -> int:
    """This process's rank before the trainer knows it, by the names that torchrun, Slurm and Lightning give it."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
    return int(next((os.environ[name] for name in names if name in os.environ), 0))


def leave_together(trainer: pl.Trainer) -> None:
    """The end of one rank may end the others: no rank leaves before the first one has written all."""
    with suppress(RuntimeError):  # one is gone already
        trainer.strategy.barrier()


def cause_of(error: BaseException, trainer: pl.Trainer, folder: Path) -> Exception | None:
    """The error of another rank behind the error of this one; None where there is no better one.

    Args:
        error: of this rank.
        trainer: of the training.
        folder: of the run.
    """
    if trainer.world_size == 1 or trainer.global_rank or not is_consequence(error):
        return None
    others = [rank for rank in range(trainer.world_size) if rank != trainer.global_rank]
    launcher = trainer.strategy.launcher
    deadline = time.monotonic() + GRACE
    while (said := what_they_said(folder, others)) is None:
        killed = {k: c for k, c in launcher.failed().items() if c < 0} if isinstance(launcher, Launcher) else {}
        if killed:
            return RankError(why_ended(killed))
        if time.monotonic() > deadline:
            return RankError(f"a rank is gone or silent, and has left no reason ({str(error).splitlines()[0]})")
        time.sleep(POLL / 4)
    text, mistake = said
    return UserError(text) if mistake else RankError(text)


def what_they_said(folder: Path, ranks: Iterable[int]) -> tuple[str, bool] | None:
    """Why ranks have failed, by themselves, and whether it is a mistake of the user; None if none has said anything."""
    paths = {rank: path for rank in ranks if (path := _path(folder, rank)).is_file()}
    said = {rank: read_json(path) for rank, path in paths.items()}
    for path in paths.values():
        path.unlink(missing_ok=True)
    text = "; ".join(f"rank {rank}: {what['error']}" for rank, what in said.items())
    return (text, any(what["mistake"] for what in said.values())) if said else None

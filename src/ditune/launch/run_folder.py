"""A run folder belongs to one process at a time, from before Hydra writes to it until the process ends."""

import errno
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from ditune.errors import UserError, fail, refusal
from ditune.files.locks import alone, keep
from ditune.launch.multirun import complete
from ditune.progress import is_first_rank

LOCK = ".lock"
RUN = ("Another training or evaluation", "Wait for it, or choose another run_dir=.")
SWEEP = ("Another sweep", "Wait for it, or give this one another name=.")


def owned(folder: Path) -> AbstractContextManager[None]:
    """The run folder belongs to this run alone inside the block. The first of several ranks holds it for all.

    Args:
        folder: the run folder.

    Raises:
        UserError: another process trains or evaluates in it.
    """
    return alone(folder / LOCK, *RUN) if is_first_rank() else nullcontext()


class OwnFolder(Callback):
    """Hydra calls it before it writes anything, so a second process changes no file of the first.

    It ends the process itself: Hydra makes only a warning of an exception in a callback, and goes on.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Take the folder of a single run."""
        if is_first_rank():
            _own_or_end(config.hydra.run.dir, *RUN, "run_dir=")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Take the folder of a sweep, after it has got its name."""
        complete(config)
        _own_or_end(config.hydra.sweep.dir, *SWEEP, "sweep_dir=")


def _own_or_end(folder: str, what: str, remedy: str, places: str) -> None:
    """Hold the folder until this process ends, or end it with a sentence; `places` are keys for another folder."""
    try:
        _own(folder, what, remedy)
    except UserError as error:
        fail(str(error))
    except OSError as error:
        text = refusal(error, places)
        if text is None:
            raise
        fail(text)


def _own(folder: str, what: str, remedy: str) -> None:
    if "${" in str(Path(folder).absolute()):
        raise UserError(f"Hydra would take the ${{ in {folder} for a reference. Choose another run_dir= or sweep_dir=.")
    try:
        keep(Path(folder) / LOCK, what, remedy)
    except FileNotFoundError as error:  # the path lies in no real file system, but in /proc or the like
        raise PermissionError(errno.EACCES, error.strerror, error.filename) from error

"""A run folder belongs to one process at a time, from before Hydra's first file in it until the process ends."""

import errno
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from ditune.cli import reported
from ditune.errors import UserError
from ditune.files.locks import alone, keep
from ditune.progress import is_first_rank

LOCK = ".lock"
RUN = ("Another training or evaluation", "Wait for it, or choose another run_dir=.")
SWEEP = ("Another sweep", "Wait for it, or give this one another name=.")


def owned(folder: Path) -> AbstractContextManager[None]:
    """The run folder is this run's alone inside of the block. Of several ranks the first one speaks for all.

    Raises:
        UserError: another process trains or evaluates in it.
    """
    return alone(folder / LOCK, *RUN) if is_first_rank() else nullcontext()


class OwnFolder(Callback):
    """Hydra calls it before it writes anything: who comes second changes no file of the first."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        if is_first_rank():
            reported(lambda: _own(config.hydra.run.dir, *RUN), config.traceback, "run_dir=")

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        reported(lambda: _own(config.hydra.sweep.dir, *SWEEP), config.traceback, "sweep_dir=")


def _own(folder: str, what: str, remedy: str) -> None:
    if "${" in str(Path(folder).absolute()):
        raise UserError(f"Hydra would take the ${{ in {folder} for a reference. Choose another run_dir= or sweep_dir=.")
    try:
        keep(Path(folder) / LOCK, what, remedy)
    except FileNotFoundError as error:  # of a path that lies in no real file system, such as /proc
        raise PermissionError(errno.EACCES, error.strerror, error.filename) from error

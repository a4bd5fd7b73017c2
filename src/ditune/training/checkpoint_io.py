"""Lightning checkpoints that are whole or not there, and the search for the newest whole one."""

import logging
import zipfile
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ditune.errors import UserError
from ditune.files.atomic import atomic
from ditune.progress import amount

log = logging.getLogger(__name__)

BEST = Path("best.pt")  # of the best weights; no training goes on from them, so the file is no .ckpt


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames: Lightning's own goes through the temporary folder, often another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        with atomic(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict:
        return torch.load(path, map_location="cpu", weights_only=True)


def rewind(checkpoint: dict[str, Any], accumulate: int) -> None:
    """Let Lightning's loops go on at the first micro-step after the last whole optimizer step.

    A run may stop between micro-steps, and Lightning raises its loggers' step only after it has saved. Checked with
    pytorch-lightning 2.6; the keys are of its loops' state.

    Args:
        checkpoint: as Lightning has read it; changed in place.
        accumulate: micro-steps of an optimizer step.
    """
    loop = checkpoint["loops"]["fit_loop"]
    done = checkpoint["global_step"] * accumulate
    for span in ("total", "current"):
        loop["epoch_loop.batch_progress"][span].update(ready=done, started=done, processed=done, completed=done)
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"]


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step_{step:08d}.ckpt"


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, None where the run has saved none yet.

    Raises:
        UserError: there are checkpoints and all of them are damaged; a run never starts over in silence.
    """
    for leftover in folder.glob(".*.tmp-*"):
        leftover.unlink(missing_ok=True)  # all ranks clean up
    found = sorted(folder.glob("*.ckpt"), reverse=True)
    for path in found:
        if is_whole(path):
            return path
        log.warning("The checkpoint %s is damaged; trying the one before it.", path)
    if found:
        raise UserError(f"All checkpoints in {folder} are damaged. Delete them to start the run anew.")
    return None


def is_whole(path: Path) -> bool:
    """Whether a file of torch.save is undamaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None  # compares every file's CRC, so it finds flipped bits too
    except (zipfile.BadZipFile, OSError):
        return False


def remove_checkpoints(folder: Path) -> None:
    """Remove all that only a training needs which goes on; what it has saved as its result lies elsewhere.

    Args:
        folder: of a finished run's checkpoints.
    """
    files = sorted(path for path in folder.glob("*") if path.suffix in (".ckpt", BEST.suffix))
    size = sum(path.stat().st_size for path in files)
    for path in files:
        path.unlink()
    if files:
        text = "the run has finished: %d files of its checkpoints are removed, %s (callbacks.checkpoint.keep_finished)"
        log.info(text, len(files), amount(size, "bytes"))

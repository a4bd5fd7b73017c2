"""Lightning checkpoints that are whole or not there: how they are written, kept and read."""

import logging
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from ditune.checkpoints.source import UNREADABLE
from ditune.errors import CAUSES, FULL, UserError
from ditune.files.atomic import atomic
from ditune.progress import amount
from ditune.training.sharded_checkpoint import Unusable, leftovers, read, read_facts

log = logging.getLogger(__name__)

BEST = Path("best.pt")  # of the best weights; no training goes on from them, so the file is no .ckpt
NAME = re.compile(r"step_(\d+)\.ckpt")
LEAST = 2  # checkpoints that are kept at the least: the newest one may turn out to be damaged
OVERHEAD = 2**16, 2**9  # bytes of a checkpoint besides its tensors, and for each of them
STOP, CONTINUE = "stop", "continue"  # what a full disk does to a training
FOREIGN = (*UNREADABLE, OSError, OverflowError, MemoryError, zlib.error)  # what readers raise
PARTS = {
    "global_step": int,
    "epoch": int,
    "pytorch-lightning_version": str,
    "loops": dict,
    "callbacks": dict,
    "state_dict": dict,
    "ema": dict,
    "teacher": dict,
    "method": dict,
    "balance": dict,
    "identity": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames: Lightning's own goes through the temporary folder, often another disk.

    Args:
        keep: newest checkpoints that stay; -1 = all.
        on_full: whether a checkpoint for which the disk has no room ends the training ("stop") or not ("continue").
    """

    def __init__(self, keep: int = -1, on_full: str = STOP):
        self.keep, self.on_full = keep, on_full
        self._written: set[Path] = set()  # by this process, which need not read them to know that they are whole

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint, then remove those that are too old; called in one process.

        Args:
            checkpoint: its content.
            path: of the file.
            storage_options: another `on_full`.

        Raises:
            UserError: it cannot be written, and `on_full` is "stop" or more than room is lacking.
        """
        path = Path(path)
        if self.write(checkpoint, path, storage_options or self.on_full):
            self.retain(path)

    def retain(self, newest: Path) -> None:
        """Remove the checkpoints that are too old, by the files that are there; the newest one has just been written.

        What follows the newest one stays: it is of steps that are still to come, or of another run.
        """
        self._written.add(newest)
        if self.keep < 0:
            return
        kept = 1
        for path in checkpoints_in(newest.parent):
            if not -1 < step_of(path) < step_of(newest):
                continue
            if kept >= max(self.keep, LEAST):
                remove(path)
            elif path in self._written or unreadable(path) is None:
                kept += 1

    def write(self, content: dict[str, Any], path: Path, on_full: str | None = None) -> bool:
        """Write a file if there is room for it; whether it was written. See `save_checkpoint`."""
        needed, code = size_of(content), None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(path.parent).free
            if needed <= free:
                with atomic(path) as temporary:
                    torch.save(content, temporary)
                return True
        except OSError as error:  # its traceback holds the half file open, so it must be gone before anything is said
            if error.errno not in CAUSES:
                raise
            code = error.errno
        self.refuse(path, needed, code, on_full or self.on_full)
        return False

    def refuse(self, path: Path, needed: int, code: int | None, on_full: str) -> None:
        """Say why a file was not written; `code` is the system's, None = there is no room."""
        if code is None or code in FULL:
            free = amount(shutil.disk_usage(path.parent).free, "bytes")
            text = f"{path} needs {amount(needed, 'bytes')}, and {free} are free"
            remedy = "Free some space, or move the run folder to another disk"
        else:
            text = f"{path} cannot be written: {CAUSES[code]} (it needs {amount(needed, 'bytes')})"
            remedy = "Make its folder writable, or move the run folder to another disk"
        if on_full == CONTINUE and (code is None or code in FULL):
            log.warning("%s: it is left out, and the training goes on", text)
            return
        raise UserError(f"{text}. {remedy}; resume=auto goes on from the checkpoint before.")

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict:
        if Path(path).is_dir():
            return read(Path(path))
        return torch.load(path, map_location="cpu", weights_only=True)


def size_of(content: Any) -> int:
    """Bytes that a checkpoint takes on the disk, of all processes together."""
    return OVERHEAD[0] + sum(t.numel() * t.element_size() + OVERHEAD[1] for t in tensors(content))


def remove(path: Path) -> None:
    """Remove a checkpoint, a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tensors(content: Any) -> Iterator[Tensor]:
    """All tensors of nested dicts and lists."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for value in content.values() if isinstance(content, dict) else content:
            yield from tensors(value)


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


def checkpoints_in(folder: Path) -> list[Path]:
    """What calls itself a checkpoint, the newest first; other files than ours come last."""

    return sorted(folder.glob("*.ckpt"), key=lambda path: (step_of(path), path.name), reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, -1 where it has none."""
    name = NAME.fullmatch(path.name)
    return int(name[1]) if name else -1


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run that can be read, None where the run has saved none yet.

    Raises:
        UserError: there are checkpoints and none of them can be read; a run never starts over in silence.
    """
    reasons = {}
    for path in checkpoints_in(folder):
        reasons[path] = unreadable(path)
        if reasons[path] is None:
            return path
    if reasons:
        raise none_usable(folder, reasons)
    return None


def none_usable(folder: Path, reasons: dict[Path, str]) -> UserError:
    """The refusal of a run whose checkpoints were all rejected."""
    lines = "; ".join(f"{path.name} {reason}" for path, reason in reasons.items())
    return UserError(
        f"All checkpoints in {folder} are unusable: {lines}. "
        "Copy one back from elsewhere, or delete them to start the run anew."
    )


def unreadable(path: Path) -> str | None:
    """Why a file is no checkpoint of ours, None if it is one; said once in the log."""
    try:
        facts = [file.stat() for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return _unreadable(path, tuple((fact.st_size, fact.st_mtime_ns) for fact in facts))


@lru_cache(maxsize=1000)
def _unreadable(path: Path, _: tuple[tuple[int, int], ...]) -> str | None:
    """The same of one state of its files, which are read whole once."""
    try:
        read_checkpoint(path)
    except Unusable as reason:
        log.warning("The checkpoint %s %s; trying the one before it.", path, reason)
        return str(reason)
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Content of a checkpoint, memory-mapped: its tensors are read when they are used.

    Those of a checkpoint in shares, a folder, are on the meta device: they have shapes and no values.

    Raises:
        Unusable: the file is damaged or none of ours.
    """
    content = read_facts(path) if path.is_dir() else read_whole(path)
    wrong = [name for name, kind in PARTS.items() if not isinstance(content.get(name), kind)]
    if wrong:
        raise Unusable(f"is no checkpoint of ours: it lacks {', '.join(wrong)}")
    for name in ("state_dict", "ema"):
        if not all(isinstance(value, Tensor) for value in content[name].values()):
            raise Unusable(f"is no checkpoint of ours: its {name} holds more than tensors")
    try:
        rewind(content, 1)
        content["identity"]["precision"]
    except (KeyError, TypeError, AttributeError) as error:
        raise Unusable(f"is no checkpoint of ours: it lacks {error}") from None
    if step_of(path) not in (-1, content["global_step"]):
        raise Unusable(f"is of step {content['global_step']}, as its content says")
    return content


def read_whole(path: Path) -> dict[str, Any]:
    """The dict in an undamaged file of torch.save, memory-mapped. Nothing in it is executed.

    Raises:
        Unusable: the file is damaged or holds something else.
    """
    if not is_whole(path):
        raise Unusable("is damaged")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FOREIGN as error:  # without torch's words, which advise to execute what is in the file
        raise Unusable(f"is none of ours ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise Unusable(f"is none of ours: it holds a {type(content).__name__}")
    return content


def is_whole(path: Path) -> bool:
    """Whether a file of torch.save is undamaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                return False  # torch compresses nothing, and a bomb is compressed
            return archive.testzip() is None  # compares every file's CRC, so it finds flipped bits too
    except FOREIGN:
        return False


def remove_checkpoints(folder: Path) -> None:
    """Remove all that only a training needs which goes on; what it has saved as its result lies elsewhere.

    Args:
        folder: of a finished run's checkpoints.
    """
    found = sorted(path for path in folder.glob("*") if path.suffix in (".ckpt", BEST.suffix))
    files = [file for path in found for file in (path.iterdir() if path.is_dir() else [path])]
    size = sum(file.stat().st_size for file in files)
    for path in (*found, *leftovers(folder)):
        remove(path)
    if files:
        text = "the run has finished: %d files of its checkpoints are removed, %s (callbacks.checkpoint.keep_finished)"
        log.info(text, len(files), amount(size, "bytes"))

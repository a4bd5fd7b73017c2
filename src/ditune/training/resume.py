"""The checkpoint that a run goes on from."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ditune.errors import UserError
from ditune.files.atomic import read_or_set_aside
from ditune.training.checkpoint_io import newest_checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run goes on from.

    Args:
        path: of the checkpoint; None = the run is new.
        step: optimizer steps that are done.
        seconds: of training that are behind the run.
        micro_batch: images that one process handled at once; None = the checkpoint does not say.
    """

    path: Path | None
    step: int
    seconds: float
    micro_batch: int | None = None


def find_checkpoint(folder: Path, resume: str | None, max_steps: int, key: dict[str, Any]) -> Resumed:
    """The newest whole checkpoint of a run folder.

    Args:
        folder: of the run.
        resume: "auto" = go on if there is a checkpoint; None = refuse a folder that holds one.
        max_steps: of this start.
        key: what must be the same when a run goes on, see `ditune.config.training.resume_key`.

    Raises:
        UserError: there is a checkpoint and `resume` is None; or it is of other settings, or lies behind max_steps.
    """
    if resume not in (None, "auto"):
        raise UserError(f"resume is {resume!r}. Set resume=auto and run_dir=<the run's folder>, or leave it out.")
    newest = newest_checkpoint(folder / "checkpoints")
    result = read_or_set_aside(folder / "result.json")
    if newest is None:
        if result.get("status") == "finished":
            raise UserError(
                f"The run folder {folder} holds a finished run, whose checkpoints are gone or were never due. "
                "Choose another run_dir, or delete the folder to run it again."
            )
        if resume:
            log.warning("nothing to resume in %s: the run begins at step 0", folder)
        return Resumed(None, 0, 0.0)
    if resume is None:
        raise UserError(
            f"The run folder {folder} already holds checkpoints. Add resume=auto to go on, or choose another run_dir."
        )
    checkpoint = torch.load(newest, map_location="cpu", weights_only=True, mmap=True)
    step, theirs = checkpoint["global_step"], checkpoint["identity"]
    different = [f"{k} ({theirs.get(k)} there, {v} now)" for k, v in key.items() if theirs.get(k) != v]
    if different:
        raise UserError(
            f"The checkpoint is of another run: {', '.join(different)}. "
            "Resume with the run's own settings, or start a new run folder."
        )
    if step > max_steps:
        raise UserError(
            f"In {folder} the run is at step {step} already; max_steps={max_steps} lies before it. "
            f"Set max_steps={step} or more, or start a new run folder."
        )
    return Resumed(newest, step, result.get("seconds", {}).get("fit", 0.0), checkpoint.get("micro_batch"))

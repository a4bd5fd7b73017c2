"""Weights & Biases, offline for those who are not logged in."""

import hashlib
import netrc
import os
from pathlib import Path

import pytorch_lightning as pl
import wandb
from pytorch_lightning.loggers import WandbLogger


def logged_in() -> bool:
    """Whether this machine holds a key for W&B: in the environment, or in ~/.netrc as `wandb login` leaves it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def wandb_logger(
    folder: str, project: str, name: str, group: str, tags: list[str], offline: bool | None
) -> WandbLogger:
    """A W&B run that belongs to the run folder: a resumed run goes on with the same one.

    Args:
        folder: the run's folder; W&B's own files go to its wandb/.
        project, name, group, tags: as W&B shows them.
        offline: nothing is sent, `wandb sync` can do it later; None = offline unless logged in.
    """
    return WandbLogger(
        save_dir=folder,
        project=project,
        name=name,
        group=group,
        tags=list(tags),
        id=hashlib.sha256(str(Path(folder).resolve()).encode()).hexdigest()[:12],
        resume="allow",
        offline=not logged_in() if offline is None else offline,
    )


def close_loggers(trainer: pl.Trainer, failed: bool) -> None:
    """Let W&B show failed runs as failed, and let the next job of a sweep begin a run of its own."""
    for logger in trainer.loggers:
        logger.save()
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            wandb.finish(exit_code=int(failed))

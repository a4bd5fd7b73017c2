"""Weights & Biases, offline for those who are not logged in."""

import hashlib
import netrc
import os
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

# which of a metric's values stands for the run
SUMMARIES = {"train/loss": "min,last"} | {f"eval/{name}_*": "min" for name in ("kid", "fd", "fid", "sfid")}
SUMMARIES |= {f"eval/{name}_*": "max" for name in ("is", "precision", "recall", "density", "coverage")}


def logged_in() -> bool:
    """Whether this machine holds a key for W&B: in the environment, or in ~/.netrc as `wandb login` leaves it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


class WandbRun(WandbLogger):
    """A W&B run that belongs to the run folder: a resumed run goes on with the same one.

    Args:
        folder: the run's folder; W&B's own files go to its wandb/.
        project, name, group: as W&B shows them; a sweep's runs have one group.
        labels: tags that say what the run is: method, data, network.
        tags: further ones.
        log_adapter: send the trained weights as an artifact.
        offline: nothing is sent, `wandb sync` can do it later; None = offline unless logged in.
    """

    def __init__(
        self,
        folder: str,
        project: str,
        name: str,
        group: str,
        labels: list[str],
        tags: list[str],
        log_adapter: bool,
        offline: bool | None,
    ):
        super().__init__(
            save_dir=folder,
            project=project,
            name=name,
            group=group,
            job_type="train",
            tags=list(dict.fromkeys([*labels, *tags])),
            id=hashlib.sha256(str(Path(folder).resolve()).encode()).hexdigest()[:12],
            resume="allow",
            offline=not logged_in() if offline is None else offline,
        )
        self.log_adapter = log_adapter

    @rank_zero_only
    def describe(self, parameters: list[tuple[str, int, int]]) -> None:
        """What to call best of each metric, and which parameters train: rows of (kind, trained, frozen)."""
        import wandb  # here and below: it takes seconds, and other loggers do without

        run = self.experiment
        for pattern, summary in SUMMARIES.items():
            run.define_metric(pattern, step_metric="trainer/global_step", summary=summary)
        run.log({"parameters": wandb.Table(["parameter", "trained", "frozen"], [list(row) for row in parameters])})
        trained, frozen = (sum(row[k] for row in parameters) for k in (1, 2))
        run.summary.update({"parameters/trained": trained, "parameters/share": trained / (trained + frozen)})

    @rank_zero_only
    def finish_training(self, folder: Path) -> None:
        """The evaluation's pictures, and the adapter (or network) where that is asked for."""
        grid = folder / "samples" / "grid.png"
        if grid.is_file():
            self.log_image("eval/grid", [str(grid)])
        if not self.log_adapter:
            return
        import wandb

        artifact = wandb.Artifact(f"adapter-{self.version}", type="model")
        if (folder / "adapter").is_dir():
            artifact.add_dir(str(folder / "adapter"))
        else:
            artifact.add_file(str(folder / "network.safetensors"))
        self.experiment.log_artifact(artifact)


def close_loggers(trainer: pl.Trainer, failed: bool) -> None:
    """Let W&B show failed runs as failed, and let the next job of a sweep begin a run of its own."""
    for logger in trainer.loggers:
        logger.save()
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            import wandb

            wandb.finish(exit_code=int(failed))

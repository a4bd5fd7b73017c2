"""Weights & Biases, offline for those who are not logged in."""

import logging
import netrc
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from ditune.errors import UserError
from ditune.files.atomic import atomic
from ditune.training.loggers.closing import Closing
from ditune.training.loggers.metrics_csv import MetricsCsv

log = logging.getLogger(__name__)

# limits of W&B's server, whose own messages come after the data and the network are ready
TAG, NAME, PROJECT = 64, 128, 128  # characters
NOT_IN_A_PROJECT = "/\\#?%:"
ID_FILE = "wandb_id"


@cache
def warn_once(what: str, text: str, limit: int) -> None:
    log.warning("the W&B %s %r has more than %d characters and is cut", what, text, limit)


def shortened(value: object, limit: int, what: str) -> str | None:
    """`value` as text that W&B takes; None = W&B chooses."""
    if value is None:
        return None
    text = str(value).strip()
    if len(text) > limit:
        warn_once(what, text, limit)
    return text[:limit].strip()


def tags_of(values: object) -> list[str]:
    """Tags as W&B takes them: texts of 1 to 64 characters, each once."""
    several = [values] if isinstance(values, str) or not isinstance(values, Iterable) else values
    texts = [shortened(value, TAG, "tag") for value in several]
    return list(dict.fromkeys(filter(None, texts)))


def project_of(value: object) -> str:
    """The name of a W&B project.

    Raises:
        UserError: W&B allows no such name.
    """
    text = "" if value is None else str(value).strip()
    wrong = sorted(set(text) & set(NOT_IN_A_PROJECT))
    if wrong:
        raise UserError(
            f"logger.project is {text!r}, but W&B allows none of {NOT_IN_A_PROJECT} in the name of a project. "
            "Set logger.project to a name without them; WANDB_ENTITY=<team> in the environment chooses a team."
        )
    if not 1 <= len(text) <= PROJECT:
        raise UserError(f"logger.project has {len(text)} characters. Give it 1 to {PROJECT}.")
    return text


def run_id(folder: Path) -> str:
    """The id of the W&B run that belongs to a run folder; a new one for a training that begins.

    It is kept in the folder, so that a copy of the folder elsewhere goes on with its run. Folders of earlier versions
    have it in the names of W&B's own.
    """
    if not any((folder / "checkpoints").glob("*.ckpt")):
        return secrets.token_hex(4)
    kept = folder / ID_FILE
    if kept.is_file():
        return kept.read_text(encoding="utf-8").strip()
    theirs = sorted((folder / "wandb").glob("*run-*-*"), key=lambda path: path.name.split("run-")[-1])
    ids = [match[1] for path in theirs if (match := re.fullmatch(r"(?:offline-)?run-\d+_\d+-(\w+)", path.name))]
    return ids[-1] if ids else secrets.token_hex(4)


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
        project, name, group: as W&B shows them; a sweep's runs have one group. Long ones are cut to W&B's limits.
        labels: tags that say what the run is: method, data, network.
        tags: further ones; of any type, cut as well.
        log_adapter: send the trained weights as an artifact.
        offline: nothing is sent, `wandb sync` can do it later; None = offline unless logged in.

    Raises:
        UserError: W&B allows no such project.
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
            project=project_of(project),
            name=shortened(name, NAME, "name"),
            group=shortened(group, NAME, "group"),
            job_type="train",
            tags=list(dict.fromkeys([*tags_of(labels), *tags_of(tags)])),
            id=run_id(Path(folder)),
            resume="allow",
            offline=not logged_in() if offline is None else offline,
        )
        self.folder, self.log_adapter = Path(folder), log_adapter

    @rank_zero_only
    def keep_id(self) -> None:
        """Write the run's id into the run folder, where a resumed run finds it."""
        with atomic(self.folder / ID_FILE) as temporary:
            temporary.write_text(f"{self.version}\n", encoding="utf-8")

    @rank_zero_only
    def describe(self, parameters: list[tuple[str, int, int]]) -> None:
        """Which parameters train: rows of (kind, trained, frozen)."""
        import wandb  # here and below: it takes seconds, and other loggers do without

        run = self.experiment
        run.log({"parameters": wandb.Table(["parameter", "trained", "frozen"], [list(row) for row in parameters])})
        trained, frozen = (sum(row[k] for row in parameters) for k in (1, 2))
        run.summary.update({"parameters/trained": trained, "parameters/share": trained / (trained + frozen)})

    @rank_zero_only
    def summarise(self, result: dict[str, Any]) -> None:
        """The content of result.json as the run's summary.

        All are plain numbers. `define_metric(..., summary="min")` would make {"min": 1.5} of a number, which panels do
        not find; and where a glob and Lightning's own "*" fit a key, W&B takes either of them.
        """
        self.experiment.summary.update(summary_of(result))

    @rank_zero_only
    def finish_training(self, folder: Path) -> None:
        """The evaluation's images, and the adapter (or network) where that is asked for."""
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


SUMMARY = {  # parts of result.json and their names in W&B; a metric of the trained network is eval/<metric>
    "metrics/after": "eval",
    "metrics/before": "before",
    "metrics/base_domain": "base_domain",
    "metrics": "eval",  # gap_before, gap_after, gap_closed
    "denoising/after": "eval/test_loss",
    "denoising/before": "before/test_loss",
}
LEFT_OUT = ("metrics/protocol", "peft", "versions", "data")  # W&B has them among the run's config
TEXTS = ("status", "error", "evaluated/checkpoint", "evaluated/metric")


def summary_of(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a result.json by flat names, such as eval/kid_efflite0, seconds/fit and parameters/share."""
    summary = {}
    for name, value in flat(result):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name.startswith(LEFT_OUT) or not (number or name in TEXTS):
            continue
        part = next((part for part in SUMMARY if name == part or name.startswith(f"{part}/")), None)
        summary[name if part is None else SUMMARY[part] + name.removeprefix(part)] = value
    return summary


def flat(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(name with slashes, value) of all that is no group."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}/")
        else:
            yield f"{path}{key}", value


def close_loggers(trainer: pl.Trainer, result: dict[str, Any], exit_code: int) -> None:
    """Let W&B have the result, show failed and stopped runs as such, and let the next job begin a run of its own.

    Args:
        trainer: with the loggers.
        result: content of the run's result.json.
        exit_code: 0 = finished.
    """
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCsv):
            logger.write()  # its save() may wait for more lines
        else:
            logger.save()
        if isinstance(logger, WandbRun) and trainer.is_global_zero:
            import wandb

            logger.summarise(result)
            wandb.finish(exit_code=exit_code)
        elif isinstance(logger, Closing) and trainer.is_global_zero:
            logger.close(summary_of(result), exit_code)

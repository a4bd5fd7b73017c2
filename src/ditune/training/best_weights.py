"""The best weights of a training by a metric, in one file beside its checkpoints."""

import logging
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ditune.distributed import is_spread, spread_like, whole
from ditune.errors import UserError
from ditune.metrics.names import lower_is_better
from ditune.moe.balance import Balance
from ditune.training.checkpoint_io import BEST, Unusable, read_whole

log = logging.getLogger(__name__)

PARTS = {"metric": str, "value": float, "step": int, "state_dict": dict, "method": dict, "balance": dict}


class BestWeights:
    """The EMA weights that were best by a metric so far.

    The file says itself which step and value it is of. So it needs no place in the checkpoints: a training that goes
    on from an earlier step measures the same values again, and finds the same best.

    Args:
        folder: of the run's checkpoints.
        metric: by which weights are compared, without "val/".
        first_step: that the training goes on from; 0 = it is new, and what lies in the folder is of another one.
        max_steps: of the training.
        writes: whether this process writes the file; all processes read it.
    """

    def __init__(self, folder: Path, metric: str, first_step: int, max_steps: int, writes: bool):
        self.path, self.metric, self.writes = folder / BEST, metric, writes
        self.lower, self.step, self.value = lower_is_better(metric), 0, math.nan
        if first_step:
            self._read(max_steps)
        elif writes:
            self.path.unlink(missing_ok=True)

    def _read(self, max_steps: int) -> None:
        """What an earlier start of the run has found."""
        if not self.path.is_file():
            return
        saved = self._content()
        if saved is None:
            log.warning("the best weights are those from here on")
        elif saved["metric"] != self.metric:
            text = "the best weights so far were chosen by val/%s, those from here on are chosen by val/%s"
            log.warning(text, saved["metric"], self.metric)
        elif saved["step"] <= max_steps:
            self.step, self.value = saved["step"], saved["value"]

    def _content(self) -> dict[str, Any] | None:
        """What the file holds; None, with a warning, if it is damaged or none of ours."""
        try:
            saved = read_whole(self.path)
            if not all(isinstance(saved.get(name), kind) for name, kind in PARTS.items()):
                raise Unusable("holds no weights that were chosen")
        except Unusable as error:
            log.warning("%s %s", self.path, error)
            return None
        return saved

    @property
    def found(self) -> bool:
        """Whether there are any: a metric may never have been a number."""
        return not math.isnan(self.value)

    def offer(self, trainer: pl.Trainer, module: pl.LightningModule, values: dict[str, float]) -> None:
        """Keep the network's weights if they are better; called by all processes, with the average applied.

        Args:
            trainer, module: of the training.
            values: what was measured at this step; the chosen metric may not have been due.

        Raises:
            UserError: the metric is none of those that are measured.
        """
        if self.metric not in values:
            self._refuse_unknown(values)
            return
        value = values[self.metric]
        if not trainer.global_step or math.isnan(value):
            return  # before the first step it is the base
        if self.found and not (value < self.value if self.lower else value > self.value):
            return
        kept = False
        network = module.network
        trained = module.method.state_dict(network) if self.writes or is_spread(network) else {}
        trained = {name: whole(value).cpu() for name, value in trained.items()}
        if self.writes:
            content = {"metric": self.metric, "value": value, "step": trainer.global_step}
            content |= {"state_dict": trained, "method": module.method.training_state()}
            content |= {"balance": Balance.state_dict(network)}
            kept = trainer.strategy.checkpoint_io.write(content, self.path)
        if trainer.strategy.broadcast(kept):  # nobody reads what is not written yet, or not at all
            self.step, self.value = trainer.global_step, value

    def _refuse_unknown(self, values: dict[str, float]) -> None:
        metrics = [name for name in values if name != "loss"]
        if metrics and self.metric != "loss":
            raise UserError(
                f"callbacks.checkpoint.best is {self.metric}, but no such metric is measured. "
                f"Set one of {', '.join(metrics)}."
            )

    def take(self, module: pl.LightningModule) -> dict[str, Any] | None:
        """Give the module the best weights, as its network's and as their average; returns what was taken.

        None = the file has been damaged or does not fit, and the module is as it was.
        """
        saved = self._content()
        if saved is None:
            return None
        try:
            if saved["method"].keys() != module.method.training_state().keys():
                raise UserError("It is of another method.")
            module.method.load_state_dict(module.network, saved["state_dict"])
        except UserError as error:
            log.warning("%s does not fit. %s", self.path, error)
            return None
        module.method.load_training_state(saved["method"])
        Balance.load_state_dict(module.network, saved["balance"])
        for name, average in module.ema.average.items():
            average.copy_(spread_like(saved["state_dict"][name], average))
        log.info("saved and evaluated is the best by val/%s: step %d, %.4f", self.metric, self.step, self.value)
        return {"checkpoint": "best", "step": self.step, "metric": f"val/{self.metric}", "value": self.value}

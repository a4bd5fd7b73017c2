"""The load of the experts on the dashboard: numbers in metrics.csv and W&B, heat-maps in routing/."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from PIL import Image
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import WandbLogger

from ditune.files.spared import spared
from ditune.moe.plots import draw_by, draw_load
from ditune.moe.statistics import RoutingStatistics
from ditune.networks import DiTMoE


class RoutingMonitor(Callback):
    """Sums up what the routers decided since the last time: routing/load_<step>.png and routing/<...> metrics.

    At the end time.png, position.png and class.png join them.

    Args:
        folder: of the images.
        every_n_steps: steps between two summaries; 0 = only the last.
    """

    def __init__(self, folder: Path, every_n_steps: int):
        self.folder, self.every_n_steps = folder, every_n_steps
        self._module: pl.LightningModule | None = None  # the statistics are its own
        self._earlier: dict[str, Any] = {}  # of the run that this one goes on from

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self._module = module

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if isinstance(module.network, DiTMoE) and module.balance is not None:
            module.statistics = RoutingStatistics(module.network, module.device)
            if self._earlier and trainer.is_global_zero:  # the sums of all processes
                module.statistics.load_state_dict(self._earlier)

    def state_dict(self) -> dict[str, Any]:
        """Sums since the last summary, of all processes, each of which is asked when a checkpoint is saved."""
        if self._module is None or self._module.statistics is None:
            return {}
        return self._module.statistics.state_dict() | {"means": dict(self._module.routing)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the sums of a checkpoint until the training starts; where all steps are done, it never does."""
        self._earlier, self._module.routing = state_dict, state_dict["means"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.statistics is None or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step, last = trainer.global_step, trainer.global_step == trainer.max_steps
        if not last and (not self.every_n_steps or step % self.every_n_steps):
            return
        statistics = module.statistics
        module.statistics = RoutingStatistics(module.network, module.device)
        statistics.over_processes()
        if not trainer.is_global_zero:
            return
        module.routing = {name: by_layer.mean().item() for name, by_layer in statistics.per_layer().items()}
        path = self.folder / f"load_{step:07d}.png"
        with spared("heat-maps of the routing"):
            draw_load(statistics, path)
            if last:
                for name in statistics.counts:
                    draw_by(statistics, name, self.folder / f"{name}.png")
        for logger in trainer.loggers:
            # the step as that of all other lines of this moment
            logger.log_metrics(statistics.log(), step=step - 1)
            if isinstance(logger, WandbLogger):
                images = [path, *(self.folder / f"{name}.png" for name in statistics.counts if last)]
                images = [path for path in images if path.is_file()]
                logger.log_image("routing", [Image.open(p) for p in images], caption=[p.stem for p in images])

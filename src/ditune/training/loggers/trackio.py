"""Trackio: a local dashboard (`trackio show`), or one in a Space of the Hugging Face hub."""

from collections.abc import Mapping
from typing import Any

from PIL import Image
from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from pytorch_lightning.utilities import rank_zero_only

from ditune.training.loggers.closing import Closing, require_package


class TrackioRun(Logger, Closing):
    """A run of Trackio, which begins with the first number; a resumed run goes on under the same name.

    Args:
        project: that the run belongs to.
        name: of the run.
        group: of a sweep's runs.
        space: <user>/<name> of a Space that shows it; null = on this machine, and nothing is sent.

    Raises:
        UserError: the package is missing.
    """

    def __init__(self, project: str, name: str, group: str | None, space: str | None) -> None:
        require_package("trackio", "trackio>=0.40,<1")
        super().__init__()
        self.project, self.run_name, self.group, self.space = project, name, group, space
        self.config: dict[str, Any] = {}
        self._run: Any = None

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str:
        return self.run_name

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of Trackio."""
        import trackio  # it takes a second, and other loggers do without

        if self._run is None:
            place = {} if self.space is None else {"space_id": self.space}
            self._run = trackio.init(
                self.project,
                name=self.run_name,
                group=self.group,
                config=self.config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
                **place,
            )
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.config = dict(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log({key: value for key, value in metrics.items() if key != "epoch"}, step=step)

    @rank_zero_only
    def show(self, name: str, image: Image.Image, step: int) -> None:
        """See `Closing`."""
        import trackio

        self.experiment.log({name: trackio.Image(image, caption=f"step {step}")}, step=step)

    @rank_zero_only
    def close(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """See `Closing`."""
        self.experiment.log({f"result/{key}": value for key, value in summary.items()} | {"exit_code": exit_code})
        self.experiment.finish()
        self._run = None

"""MLflow: a run in a folder of this machine, or on a tracking server."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from pytorch_lightning.loggers import MLFlowLogger
from pytorch_lightning.utilities import rank_zero_only

from ditune.training.loggers.closing import Closing, flattened, require_package

LONGEST = 6000  # characters of a parameter's value; MLflow refuses longer ones


class MlflowRun(MLFlowLogger, Closing):
    """Lightning's logger, with the run's images and its result; a resumed run is a new run of MLflow.

    Args:
        tracking_uri: server or folder (file:<path>); null = MLFLOW_TRACKING_URI, else `folder`.
        folder: of runs, where nothing else is said.
        project: name of the experiment.
        name: of the run.
        tags: texts that say what the run is.

    Raises:
        UserError: the package is missing.
    """

    def __init__(self, tracking_uri: str | None, folder: str, project: str, name: str, tags: list[str]) -> None:
        require_package("mlflow", "mlflow-skinny>=3,<4")
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or Path(folder).absolute().as_uri()
        if uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else MLflow 3 wants a database
        super().__init__(project, name, tracking_uri=uri, tags=dict.fromkeys(map(str, tags), ""))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        values = {key: str(value)[:LONGEST] for key, value in flattened(params).items()}
        super().log_hyperparams(values)

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """The run goes on with the evaluation; `close` ends it."""

    @rank_zero_only
    def show(self, name: str, image: Image.Image, step: int) -> None:
        """See `Closing`."""
        self.experiment.log_image(self.run_id, image, artifact_file=f"{name}/step_{step:07d}.png")

    @rank_zero_only
    def close(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """See `Closing`."""
        for key, value in summary.items():
            if isinstance(value, int | float):
                self.experiment.log_metric(self.run_id, f"result/{key}", value)
            else:
                self.experiment.set_tag(self.run_id, key, str(value)[:LONGEST])
        self.experiment.set_terminated(self.run_id, "FINISHED" if exit_code == 0 else "FAILED")

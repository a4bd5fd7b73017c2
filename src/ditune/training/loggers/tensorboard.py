"""TensorBoard's events, which a training can do without."""

from collections.abc import Callable
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger

from ditune.files.spared import spared


class SparedTensorBoard(TensorBoardLogger):
    """Lightning's logger; once the disk has refused a write, it writes nothing more, and the training goes on."""

    refused = False

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self._spare(super().log_metrics, *args, **kwargs)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self._spare(super().log_hyperparams, *args, **kwargs)

    def save(self) -> None:
        self._spare(super().save)

    def finalize(self, status: str) -> None:
        self._spare(super().finalize, status)

    def add_image(self, *args: Any) -> None:
        """As that of its writer."""
        self._spare(lambda: self.experiment.add_image(*args))

    def _spare(self, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if self.refused:
            return
        with spared("TensorBoard's events"):
            try:
                write(*args, **kwargs)
            except (OSError, ValueError) as error:  # Lightning makes a ValueError of any
                cause = error if isinstance(error, OSError) else error.__cause__
                if not isinstance(cause, OSError):
                    raise
                self.refused = True  # the thread that writes has ended with the error
                raise cause from None

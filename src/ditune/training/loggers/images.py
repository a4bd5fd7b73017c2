"""Images of a training for every logger that shows some."""

from collections.abc import Sequence

from PIL import Image
from pytorch_lightning.loggers import Logger, WandbLogger

from ditune.training.loggers.closing import Closing
from ditune.training.loggers.tensorboard import SparedTensorBoard


def log_image(loggers: Sequence[Logger], name: str, image: Image.Image, step: int) -> None:
    """Send an image to the loggers that take one.

    Args:
        loggers: of the trainer.
        name: what it shows.
        image: of any size.
        step: of the training.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [image], caption=[f"step {step}"])
        elif isinstance(logger, SparedTensorBoard):
            from torchvision.transforms.functional import pil_to_tensor  # the import takes seconds

            logger.add_image(name, pil_to_tensor(image), step)
        elif isinstance(logger, Closing):
            logger.show(name, image, step)

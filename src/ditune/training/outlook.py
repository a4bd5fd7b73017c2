"""How long a run will take in all, estimated once its first steps have been timed."""

import logging
from dataclasses import dataclass, field

from ditune.generation.generator import ImageGenerator
from ditune.progress import duration

log = logging.getLogger(__name__)

FORWARD = 1 / 2.5  # of a training step: the share that a forward pass takes, until one has been timed


@dataclass
class Outlook:
    """What a run does besides its steps.

    Args:
        max_steps: of the training.
        batch_size: images of a step.
        calls: forward passes that generating one image takes.
        sheet_images: images of one sample sheet.
        every_n_steps: between two sheets; 0 = only the first and the last.
        held_out_calls: forward passes of the loss on held-out images.
        evaluation_images: images that the evaluation generates.
        checks: (steps between two, forward passes of one) of what is measured while the training runs.
    """

    max_steps: int
    batch_size: int
    calls: float
    sheet_images: int
    every_n_steps: int
    held_out_calls: int
    evaluation_images: int = 0
    checks: list[tuple[int, float]] = field(default_factory=list)
    image_seconds: float | None = None  # for generating one, once a sheet has been timed

    def say(self, step: int, images_per_second: float) -> None:
        """Log the time that is left at `step`, by the pace of the steps before it."""
        image = self.image_seconds or self.calls * FORWARD / images_per_second
        parts = self.parts(step, 1 / images_per_second, image)
        shown = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds >= 0.5)
        log.info("%.0f images/s; expected from here: %s; in all %s", images_per_second, shown, total(parts))

    def parts(self, step: int, per_image: float, image: float) -> dict[str, float]:
        """Seconds that are left at `step`, by part of the run.

        Args:
            step: of the training.
            per_image: seconds of training, for one image.
            image: seconds for generating one image.
        """
        due = [k for k in range(step + 1, self.max_steps) if self.every_n_steps and k % self.every_n_steps == 0]
        return {
            "training": (self.max_steps - step) * self.batch_size * per_image,
            "sample sheets": (len(due) + 1) * self.sheet_images * image,
            "validation": sum((-(-(self.max_steps - step) // every)) * calls for every, calls in self.checks)
            * (image / self.calls),
            "evaluation": self.evaluation_images * image + self.held_out_calls * (image / self.calls),
        }


def total(parts: dict[str, float]) -> str:
    return duration(sum(parts.values()))


def forward_passes(generator: ImageGenerator) -> float:
    """Of one image: each step takes two where guidance is on."""
    start, end = generator.guidance_interval
    guided = (end - start) if generator.guidance != 1 else 0.0
    return generator.steps * (1 + guided)

"""Losses and gradients that are not finite: where they come from, and what happens at such a step."""

import logging
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditune.errors import UserError, require

log = logging.getLogger(__name__)

ACTIONS = ("stop", "skip")
SHOWN = 8  # images that a message names at most


class NonFinite:
    """What is done at a step whose gradient is not finite: the weights stay those of the step before.

    Args:
        action: "stop" = the training ends; "skip" = it goes on with the next step's images.
        limit: skipped steps in a row after which it ends, too.

    Attributes:
        skipped: whether the step at hand is skipped.
        in_a_row: steps that were skipped one after another, up to the last one.

    Raises:
        UserError: an unknown action, or a limit below 1.
    """

    def __init__(self, action: str = "stop", limit: int = 10):
        require(action in ACTIONS, "callbacks.nonfinite.action", action, f"Choose one of {', '.join(ACTIONS)}.")
        require(limit >= 1, "callbacks.nonfinite.limit", limit, "Set it to 1 or more.")
        self.action, self.limit, self.skipped, self.in_a_row = action, limit, False, 0
        self._step, self._losses = -1, []

    def add(self, step: int, positions: Tensor, losses: Tensor) -> None:
        """Keep a micro-batch's positions (N,) and losses (N,) until the step has ended; no device is waited for."""
        if step != self._step:
            self._step, self._losses = step, []
        self._losses.append((positions, losses))

    def is_fine(
        self,
        norm: Tensor,
        trained: dict[str, nn.Parameter],
        step: int,
        trainer: pl.Trainer,
        names: Callable[[list[int]], list[str]],
    ) -> bool:
        """Whether the step can be done; the same on all ranks, since they have the same gradients.

        Args:
            norm: of all gradients.
            trained: name to parameter, with the gradients.
            step: optimizer step, from 0.
            trainer: of the training.
            names: positions to the names of their files.

        Raises:
            UserError: it cannot, and the training ends.
        """
        self.skipped = not torch.isfinite(norm)
        if not self.skipped:
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        text = f"The gradient is not finite at step {step}; {self._cause(trained, trainer, names)}"
        if self.action == "stop" or self.in_a_row > self.limit:
            row = f" {self.in_a_row} steps in a row were so." if self.action == "skip" else ""
            raise UserError(
                f"{text}.{row} The last checkpoint is untouched. Lower optimizer.lr, set trainer.precision=32-true, "
                "or callbacks.nonfinite.action=skip for single images that are the cause."
            )
        if trainer.is_global_zero:
            log.warning("%s. The step is skipped (%d of at most %d in a row)", text, self.in_a_row, self.limit)
        return False

    def _cause(self, trained: dict[str, nn.Parameter], trainer: pl.Trainer, names: Callable) -> str:
        """The first bad tensor, and the images whose loss is not finite, of all ranks."""
        bad = [
            p
            for positions, loss in self._losses
            for p in positions[~torch.isfinite(loss).to(positions.device)].tolist()
        ]
        found: list[Any] = [None] * trainer.world_size
        mine = list(zip(bad, names(bad) or [""] * len(bad), strict=True))[:SHOWN]
        if trainer.world_size > 1:
            dist.all_gather_object(found, mine)
        else:
            found = [mine]
        images = [
            f"rank {rank}: " + ", ".join(f"position {p} ({name})" if name else f"position {p}" for p, name in images)
            for rank, images in enumerate(found)
            if images
        ]
        where = "of images at " + "; ".join(images) if images else "of no image: only the gradient"
        return f"the first bad tensor is {first_bad(trained)}, and the losses that are not finite are {where}"


def first_bad(trained: dict[str, nn.Parameter]) -> str:
    """The first tensor with a number that is not finite: a weight, or else a gradient."""
    for kind, tensors in (
        ("weight", {name: p.detach() for name, p in trained.items()}),
        ("gradient", {name: p.grad for name, p in trained.items() if p.grad is not None}),
    ):
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                return f"the {kind} of {name}"
    return "none (their norm is too large)"

"""Losses and gradients that are not finite: where they come from, and what happens at such a step."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ditune.distributed import is_spread, local, sum_over_ranks, whole
from ditune.errors import UserError, require
from ditune.peft import PeftMethod

log = logging.getLogger(__name__)

ACTIONS = ("stop", "skip")
SHOWN = 8  # images that a message names at most
ASYNCHRONOUS = ("cuda",)  # kinds of devices that a step should not wait for


@dataclass(frozen=True)
class Checked:
    """What is known of a step whose gradient has been checked on the device.

    Args:
        step: optimizer step, from 0.
        bad: scalar, 1 where the gradient is not finite, on its way from the device.
        losses: positions (N,) and losses (N,) of its micro-batches.
        names: of the P parameters that have a gradient.
        norms: of their gradients, (P,).
    """

    step: int
    bad: "Arriving"
    losses: list[tuple[Tensor, Tensor]]
    names: list[str]
    norms: Tensor


class Arriving:
    """A scalar on its way from the device. Reading it waits for what was begun before it, and for nothing after it."""

    def __init__(self, value: Tensor):
        self._value = value.to("cpu", non_blocking=True)  # to pinned memory, if it comes from a GPU
        self._there = torch.cuda.Event() if value.is_cuda else None
        if self._there is not None:
            self._there.record()

    def read(self) -> float:
        """The number."""
        if self._there is not None:
            self._there.synchronize()
        return self._value.item()


class NonFinite:
    """What is done at a step whose gradient is not finite: the weights stay those of the step before.

    Args:
        action: "stop" = the training ends; "skip" = it goes on with the next step's images.
        limit: skipped steps in a row after which it ends, too.

    Attributes:
        skipped: whether the step at hand is skipped: a scalar on the device, 1 or 0, where nobody waits for it.
        in_a_row: steps that were skipped one after another, up to the last one that is known.

    Raises:
        UserError: an unknown action, or a limit below 1.
    """

    def __init__(self, action: str = "stop", limit: int = 10):
        require(action in ACTIONS, "callbacks.nonfinite.action", action, f"Choose one of {', '.join(ACTIONS)}.")
        require(limit >= 1, "callbacks.nonfinite.limit", limit, "Set it to 1 or more.")
        self.action, self.limit, self.in_a_row = action, limit, 0
        self.skipped: bool | Tensor = False
        self._step, self._losses = -1, []
        self._unread: Checked | None = None

    def add(self, step: int, positions: Tensor, losses: Tensor) -> None:
        """Keep a micro-batch's positions (N,) and losses (N,) until the step has ended; no device is waited for."""
        if step != self._step:
            self._step, self._losses = step, []
        self._losses.append((positions, losses))

    def check(self, step: int, norm: Tensor, names: list[str], norms: Tensor) -> None:
        """Check a step's gradient on its device; `settle` reads later what was found.

        Args:
            step: optimizer step, from 0.
            norm: of all gradients; on all ranks the same, since they have the same gradients.
            names: of the P parameters that have a gradient.
            norms: of their gradients, (P,).
        """
        self.skipped = (~torch.isfinite(norm)).float()  # as torch's fused optimizers read it
        self._unread = Checked(step, Arriving(self.skipped), self._losses, names, norms)

    def settle(self, trained: dict[str, nn.Parameter], trainer: pl.Trainer, names: Callable) -> bool:
        """Read what the last check has found, if nobody has; called by all ranks.

        Args:
            trained: name to parameter.
            trainer: of the training.
            names: positions to the names of their files.

        Returns:
            Whether the step was, or can be, done.

        Raises:
            UserError: it was not, and the training ends.
        """
        checked, self._unread = self._unread, None
        if checked is None:
            return True
        if not checked.bad.read():
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        text = f"The gradient is not finite at step {checked.step}; {cause(checked, trained, trainer, names)}"
        if self.action == "stop" or self.in_a_row > self.limit:
            row = f" {self.in_a_row} steps in a row were so." if self.action == "skip" else ""
            raise UserError(
                f"{text}.{row} The last checkpoint is untouched. Lower optimizer.lr, set trainer.precision=32-true, "
                "or callbacks.nonfinite.action=skip for single images that are the cause."
            )
        if trainer.is_global_zero:
            log.warning("%s. The step is skipped (%d of at most %d in a row)", text, self.in_a_row, self.limit)
        return False


def is_maskable(optimizer: Optimizer, method: PeftMethod, devices: Iterable[torch.device]) -> bool:
    """Whether a step can be skipped on the device, so that nobody waits for it.

    torch's fused AdamW leaves weights and state alone where its attribute `found_inf` is 1. On a CPU there is nothing
    to wait for. A method that does something after each step does it on the CPU.

    Args:
        optimizer: of the training.
        method: what trains.
        devices: of what trains.
    """
    waits = type(method).after_step is not PeftMethod.after_step
    fused = type(optimizer) is AdamW and all(group["fused"] for group in optimizer.param_groups)
    return fused and not waits and all(device.type in ASYNCHRONOUS for device in devices)


def norms_of(gradients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Norm of all gradients, scalar, as `torch.nn.utils.get_total_norm` computes it, and of each one, (P,)."""
    norms = torch.stack(torch._foreach_norm([local(gradient) for gradient in gradients]))
    if is_spread(gradients[0]):  # sums of squares in float64, which do not overflow where the norm would not
        norms = sum_over_ranks(norms.double().square()).sqrt().to(norms.dtype)
    return torch.linalg.vector_norm(norms), norms


def cause(checked: Checked, trained: dict[str, nn.Parameter], trainer: pl.Trainer, names: Callable) -> str:
    """The first bad tensor, and the images whose loss is not finite, of all ranks."""
    bad = [
        p for positions, loss in checked.losses for p in positions[~torch.isfinite(loss).to(positions.device)].tolist()
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
    first = first_bad(trained, checked)
    return f"the first bad tensor is {first}, and the losses that are not finite are {where}"


def first_bad(trained: dict[str, nn.Parameter], checked: Checked) -> str:
    """The first weight that is not finite, or else the first parameter whose gradient's norm is not."""
    for name, parameter in trained.items():
        if not torch.isfinite(whole(parameter.detach())).all():
            return f"the weight of {name}"
    for name, finite in zip(checked.names, torch.isfinite(checked.norms).tolist(), strict=True):
        if not finite:
            return f"the gradient of {name}"
    return "none (their norm is too large)"

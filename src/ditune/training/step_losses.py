"""The losses of one logged step: of all its micro-batches and ranks, apart by noise level and by length of the step."""

import pytorch_lightning as pl
import torch
from torch import Tensor

from ditune.objectives import Loss

STEP_LEVELS = 7  # losses of steps of length 1, 1/2, ... 1/128 are logged apart, those between with the longer one
LOSS_BINS = 4  # quarters of the process whose losses are logged apart: 0 next to the data, 3 next to noise


class StepLosses:
    """Collects the micro-batches of a step and gives the values of its line in the log."""

    def __init__(self) -> None:
        self.step = -1
        self.micro: list[tuple[Loss, dict[str, Tensor]]] = []

    def add(self, step: int, loss: Loss, parts: dict[str, Tensor]) -> None:
        """Keep a micro-batch's loss and the parts of its balance loss; those of another step are dropped."""
        if self.step != step:  # a run goes on at the first micro-batch of a step, wherever it was stopped
            self.step, self.micro = step, []
        self.micro.append((loss._replace(total=loss.total.detach()), parts))

    def values(self, trainer: pl.Trainer) -> tuple[dict[str, Tensor], int]:
        """Means over the images of all micro-batches and ranks, by the log's names, and how many images they are.

        All ranks call it. A mean is NaN where no sample stood: Lightning repeats the last value of a name left out.
        """
        loss, parts = over_ranks(*whole(self.micro), trainer)
        values = {f"train/{name}": part.mean() for name, part in (loss.parts | parts).items()}
        bins = (loss.time * LOSS_BINS).long().clamp(max=LOSS_BINS - 1)
        for k in range(LOSS_BINS):
            values[f"train/loss_quarter_{k}"] = loss.parts["loss"][bins == k].mean()
        if loss.d is not None:
            levels = (-loss.d.clamp(min=2.0**-STEP_LEVELS).log2()).floor()
            for k in range(STEP_LEVELS + 1):
                values[f"train/loss_step_1_{2**k}"] = loss.parts["loss"][levels == k].mean()
        return values, len(loss.time)


def whole(micro: list[tuple[Loss, dict[str, Tensor]]]) -> tuple[Loss, dict[str, Tensor]]:
    """The losses of a step's micro-batches as those of one batch; nothing is kept for a backward pass."""
    losses, balances = zip(*micro, strict=True)
    if len(losses) == 1:
        return micro[0]
    together = {name: torch.cat([loss.parts[name] for loss in losses]) for name in losses[0].parts}
    time = torch.cat([loss.time for loss in losses])
    d = None if losses[0].d is None else torch.cat([loss.d for loss in losses])
    parts = {name: torch.stack([part[name] for part in balances]) for name in balances[0]}
    return Loss(torch.stack([loss.total for loss in losses]).mean(), together, time, d), parts


def over_ranks(loss: Loss, parts: dict[str, Tensor], trainer: pl.Trainer) -> tuple[Loss, dict[str, Tensor]]:
    """The losses of one rank's images as those of all ranks' images; called by all of them."""
    if trainer.world_size == 1:
        return loss, parts
    each = {"time": loss.time, **loss.parts} | ({} if loss.d is None else {"d": loss.d})  # (N,) each
    means = {name: part.float().mean() for name, part in parts.items()}
    mine = torch.stack(
        [*(v.double() for v in each.values()), *(m.double().expand(len(loss.time)) for m in means.values())]
    )
    gathered = trainer.strategy.all_gather(mine).transpose(0, 1).flatten(1)  # (columns, ranks * N)
    columns = dict(zip([*each, *(f"mean/{name}" for name in means)], gathered, strict=True))
    values = {name: columns[name].to(v.dtype) for name, v in each.items()}
    together = Loss(loss.total, {name: values[name] for name in loss.parts}, values["time"], values.get("d"))
    return together, {name: columns[f"mean/{name}"].mean() for name in means}

"""Whether all ranks still train the same weights: memory and links that fail without a word are found here."""

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from ditune.distributed import is_spread
from ditune.moe.balance import Balance
from ditune.training.ranks import RankError

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


class CompareRanks(Callback):
    """Compares a checksum of what trains, its average and the routers' biases between all ranks.

    Args:
        every_n_steps: steps between two comparisons; 0 = none.
    """

    def __init__(self, every_n_steps: int):
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world_size == 1 or not self.every_n_steps or trainer.global_step % self.every_n_steps:
            return
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            compare(trainer, tensors_of(module))


def tensors_of(module: pl.LightningModule) -> dict[str, Tensor]:
    """What must be the same on all ranks, by name: of a network that is spread over them, the routers' biases alone."""
    if is_spread(module.network):
        return Balance.state_dict(module.network)
    trained = {f"weight of {name}": p.detach() for name, p in module.method.trainable(module.network).items()}
    averages = {f"EMA of {name}": value for name, value in module.ema.average.items()}
    return trained | averages | Balance.state_dict(module.network)


def compare(trainer: pl.Trainer, tensors: dict[str, Tensor]) -> None:
    """Called by all ranks.

    Raises:
        RankError: a tensor differs; names the first one, the ranks and the step.
    """
    if not tensors:
        return
    device = trainer.strategy.root_device
    sums = trainer.strategy.all_gather(torch.stack([checksum(tensor).to(device) for tensor in tensors.values()])).cpu()
    different = (sums != sums[0]).nonzero()  # (rank, tensor)
    if not len(different):
        return
    name = list(tensors)[int(different[:, 1].min())]
    ranks = sorted({str(rank) for rank, _ in different.tolist()})
    raise RankError(
        f"After step {trainer.global_step} the {name} of rank {', '.join(ranks)} is not that of rank 0. A memory or a "
        "link between devices may be defective. Go on with resume=auto from a checkpoint of before, on other devices."
    )


def checksum(tensor: Tensor) -> Tensor:
    """Sum of a tensor's bits as whole numbers, int64: one other bit makes another sum."""
    return tensor.contiguous().view(WORDS[tensor.element_size()]).sum(dtype=torch.int64)

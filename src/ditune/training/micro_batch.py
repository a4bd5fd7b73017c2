"""`trainer.accumulate_grad_batches=auto`: the largest micro-batch that fits, found before the first step.

Micro-batches only select positions of the global batch, so their size changes rounding and nothing else.
"""

import logging
from collections.abc import Callable, Sequence

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from ditune.errors import UserError
from ditune.memory import host_memory, is_out_of_memory, size
from ditune.training.module import GenerativeModule
from ditune.training.plan import expected_memory
from ditune.training.rehearsal import Rehearsal, release

log = logging.getLogger(__name__)

AUTO = "auto"
TAKEN = 0.8  # of the host's free memory that an estimate may take
OVERHEAD = 2.5  # memory of a step on a CPU over the tensors that it saves: 1.2, and the gaps between malloc's blocks
OVERHEAD_OF_CHECKPOINTS = 5.0  # likewise with blocks that are computed twice (docs/guide/train.md)


def candidates(batch_size: int, world_size: int) -> list[int]:
    """Sizes of micro-batches that share the global batch evenly, the largest first."""
    share = batch_size // world_size
    return [share // steps for steps in range(1, share + 1) if share % steps == 0]


def largest_micro_batch(try_batch: Callable[[int], None], sizes: Sequence[int]) -> int:
    """The first size that can be done.

    Args:
        try_batch: does it; raises an error that says so where memory is not enough.
        sizes: to be tried, the largest first.

    Raises:
        Exception: that of `try_batch` for the last size, or any other error that it raises.
    """
    for tried in sizes[:-1]:
        try:
            try_batch(tried)
            return tried
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            log.info("a micro-batch of %d images does not fit", tried)
        release()  # after the block: the error's traceback holds the tensors that were too many
    try_batch(sizes[-1])
    return sizes[-1]


class FitMicroBatch(Callback):
    """Sets the trainer's accumulate_grad_batches before the first step, the same on all ranks.

    A GPU is asked by real steps, a CPU by an estimate: systems kill a process that fills the host's memory. A run
    that goes on begins with the micro-batch of its checkpoint and takes a smaller one only where that does not fit,
    so that its bits stay.

    Args:
        latent_shape: (C, h, w) of the latents.
        bf16: whether the network runs under bf16 autocast.
        compiled: whether its blocks are compiled.
    """

    def __init__(self, latent_shape: tuple[int, ...], bf16: bool, compiled: bool):
        self.latent_shape, self.bf16, self.compiled = latent_shape, bf16, compiled

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Called by the trainer when its ranks know each other and before it has read a checkpoint."""
        sizes = candidates(module.batch_size, trainer.world_size)
        begun = module.begun_with
        sizes = [s for s in sizes if begun is None or s <= begun] or sizes[-1:]
        found, failure = 0, None
        try:
            found = self._search(trainer, module, sizes)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            failure = error  # the other ranks wait for this one's answer
        device = trainer.strategy.root_device
        agreed = int(trainer.strategy.reduce(torch.tensor(found, device=device), reduce_op="min"))
        if agreed == 0:
            raise failure or UserError("Not one image fits into the memory of another rank, which says more.")
        trainer.accumulate_grad_batches = module.batch_size // (agreed * trainer.world_size)
        if trainer.is_global_zero:
            log.info(
                "micro-batch: %d images x %d micro-steps x %d processes%s",
                *(agreed, trainer.accumulate_grad_batches, trainer.world_size),
                ", as the run began" if agreed == begun else ", the largest that fits",
            )

    def _search(self, trainer: pl.Trainer, module: GenerativeModule, sizes: list[int]) -> int:
        if not can_be_tried(trainer.strategy.root_device):
            return largest_micro_batch(self._estimate(trainer, module), sizes)
        with Rehearsal(trainer, module, self.compiled) as rehearsal:
            return largest_micro_batch(rehearsal.try_batch, sizes)

    def _estimate(self, trainer: pl.Trainer, module: GenerativeModule) -> Callable[[int], None]:
        _, training, activations = expected_memory(
            module.network, module.objective, self.latent_shape, 1, self.bf16
        ).values()
        overhead = OVERHEAD_OF_CHECKPOINTS if module.network.gradient_checkpointing else OVERHEAD
        free = TAKEN * host_memory()[0] / trainer.num_devices  # of the processes on this host

        def try_batch(count: int) -> None:
            needed = (training + overhead * activations * count) * 2**20
            if needed > free and count > 1:  # an estimate is no reason to refuse a training
                raise MemoryError(f"unable to allocate {int(needed)} bytes, {size(free)} may be taken")

        return try_batch


def less_memory(trainer: pl.Trainer, module: GenerativeModule) -> str:
    """What a training can do whose memory was not enough, as a sentence with its keys."""
    micro = module.batch_size // (trainer.accumulate_grad_batches * trainer.world_size)
    smaller = [size for size in candidates(module.batch_size, trainer.world_size) if size < micro]
    ways = []
    if smaller:
        steps = module.batch_size // (smaller[0] * trainer.world_size)
        ways.append(f"trainer.accumulate_grad_batches={steps} (or more; auto finds the number)")
    if not module.network.gradient_checkpointing:
        ways.append("gradient_checkpointing=true")
    return f"Set {' or '.join(ways)}." if ways else "Free memory of the device, or take one that has more."


def can_be_tried(device: torch.device) -> bool:
    """Whether too large a step ends in an error that can be caught, and not with the process."""
    return device.type != "cpu"

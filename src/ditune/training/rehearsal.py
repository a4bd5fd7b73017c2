"""Steps of a training before it begins, to see what fits; nothing of them stays."""

import copy
import gc
from itertools import islice
from types import TracebackType
from typing import Self

import pytorch_lightning as pl
import torch
from torch import Tensor

from ditune.data.stream import MicroBatches
from ditune.training.module import GenerativeModule

RESERVED = 0.05  # of a GPU's memory that the steps leave alone: that of a long training becomes fragmented


class Rehearsal:
    """Whole steps under the settings of a training, with micro-batches of any size.

    Inside the block, gradients and the optimizer's state are there from the start, as in the middle of a training. At
    its end all is as before. No process waits for another one in it, since each may run out of memory elsewhere.

    Args:
        trainer: in its setup, with its data.
        module: that it trains.
        compiled: whether the network's blocks are compiled.
    """

    def __init__(self, trainer: pl.Trainer, module: GenerativeModule, compiled: bool):
        self.trainer, self.module, self.compiled = trainer, module, compiled
        self.device = trainer.strategy.root_device
        self.trained = module.method.trainable(module.network)
        self.before = (module.teacher, module.balance)

    def __enter__(self) -> Self:
        self.kept = {name: p.detach().cpu().clone() for name, p in self.trained.items()}
        try:
            self._begin()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _begin(self) -> None:
        module = self.module.to(self.device)
        if module.balance is not None:
            module.balance = copy.copy(module.balance)
            module.balance.scope = "sequence"  # which sums over no processes, and takes as much memory
        self.reserved = reserve(self.device)
        self.optimizer = module.make_optimizer(list(self.trained.items()))
        for parameter in self.trained.values():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()

    def try_batch(self, count: int) -> None:
        """Steps with micro-batches of `count` images, at the stages of the training between which objectives change.

        Raises:
            RuntimeError: memory is not enough, or something is wrong.
        """
        if self.compiled:
            torch.compiler.reset()  # what was compiled for sizes that did not fit
        last = self.trainer.max_steps - 1
        for step in sorted({0, last // 2, last}):
            batch = tuple(part.to(self.device) for part in self._batch(count, step))
            with self.trainer.precision_plugin.train_step_context():
                total, *_ = self.module.micro_step(batch)
            total.backward()
            self.optimizer.step()

    def _batch(self, count: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Zeros at the positions of this rank's first micro-batch of a step."""
        trainer, whole = self.trainer, self.module.batch_size
        accumulate = whole // (count * trainer.world_size)
        batches = MicroBatches(whole, accumulate, trainer.global_rank, trainer.world_size, step)
        (positions,) = islice(batches, 1)
        return trainer.datamodule.stream.blank(positions)

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.optimizer = self.reserved = None
        self.module.teacher, self.module.balance = self.before
        for name, parameter in self.trained.items():
            parameter.grad = None
            parameter.copy_(self.kept[name])
        release()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)  # result.json has that of the training


def reserve(device: torch.device) -> Tensor | None:
    """A part of a GPU's memory that nobody else gets as long as the tensor lives."""
    if device.type != "cuda":
        return None
    total = torch.cuda.mem_get_info(device)[1]
    return torch.empty(int(RESERVED * total), dtype=torch.uint8, device=device)


def release() -> None:
    """Give back what nobody uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

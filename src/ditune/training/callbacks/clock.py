"""What a training takes of time and memory."""

import time
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback


class StepClock(Callback):
    """Seconds spent in training steps; waiting for data, sheets and checkpoints do not count."""

    seconds = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._start


def peak_memory_mib(device: torch.device) -> float:
    """Most memory that this process has held on the device, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows, where nothing else of this module would fail

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

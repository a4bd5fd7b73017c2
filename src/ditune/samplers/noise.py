"""Noise that depends on the image, not on the batch."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from ditune.rng import generator


class NoiseStream:
    """Noise of some images of a seed. Image i has its own generator, so its noise is the same in every batch.

    Args:
        seed: any integer.
        indices: number i of each image.
        shape: (C, H, W) of one image.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: Sequence[int]):
        self.shape = tuple(shape)
        self.generators = [generator(seed, int(i)) for i in indices]

    def next(self) -> Tensor:  # (N, C, H, W) float32 on the CPU
        """The next standard normal noise of every image; the first call gives x_T."""
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])

    @contextmanager
    def on(self, device: torch.device) -> Iterator[Callable[[], Tensor]]:
        """`next` for a device, inside of the block.

        From its second call on, a thread has made the noise while the device was busy with the step before.

        Args:
            device: of the noise.
        """
        if device.type == "cpu":
            yield self.next
            return
        ready: list[Future[Tensor]] = []

        def make() -> Tensor:
            return self.next().pin_memory() if device.type == "cuda" else self.next()

        with ThreadPoolExecutor(1, "noise") as pool:

            def next_noise() -> Tensor:
                noise = ready.pop().result() if ready else make()
                ready.append(pool.submit(make))
                return noise.to(device, non_blocking=True)

            yield next_noise

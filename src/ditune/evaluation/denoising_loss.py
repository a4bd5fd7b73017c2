"""The loss itself as a measure: how well a network denoises held-out images."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditune.distributed import in_group, is_spread, rank, sum_over_ranks, world_size
from ditune.evaluation.held_out import HeldOut
from ditune.memory import memory_for
from ditune.objectives import Objective
from ditune.progress import meter
from ditune.rng import StepRandom

REPEATS = 4  # noise levels for each image
BATCH = 128  # images at once of all networks up to
LARGEST = 256 * 1152  # numbers in the tokens of one image: DiT-XL/2 at 256 px; of larger ones fewer
REMEDY = "What was trained is saved: free memory of the device, and resume=auto measures it again."


@dataclass(frozen=True)
class HeldOutLoss:
    """The denoising loss of any network on the same held-out images; see `denoising_loss`.

    Args:
        objective: of the training.
        source: the images.
        seed: of timesteps, noise and label drop.
        bf16: networks run under bf16 autocast.
        limit: at most so many images, evenly spaced; None = all.
    """

    objective: Objective
    source: HeldOut
    seed: int
    bf16: bool
    limit: int | None = None

    def __call__(self, network: nn.Module) -> float:
        """Loss of a network in evaluation mode; all ranks of a training call it, and get the same value."""
        return denoising_loss(network, self.objective, self.source, self.seed, self.bf16, self.limit)


def denoising_loss(
    network: nn.Module, objective: Objective, source: HeldOut, seed: int, bf16: bool, limit: int | None = None
) -> float:
    """Mean loss over the images, each at the same few timesteps with the same noise for every network.

    It is far less noisy than a distance of generated images. It does not see how errors add up over sampling steps.
    The ranks of a process group share the batches, and the value is that of one process to the bit.

    Args:
        network: in evaluation mode.
        objective: of its training; labels are dropped as there.
        source: usually a test split.
        seed: of timesteps, noise and label drop.
        bf16: the network runs under bf16 autocast.
        limit: at most so many images, evenly spaced; None = all.
    """
    return image_losses(network, objective, source, seed, bf16, limit).mean().item()


@torch.inference_mode()
def image_losses(
    network: nn.Module, objective: Objective, source: HeldOut, seed: int, bf16: bool, limit: int | None = None
) -> Tensor:  # (REPEATS, N)
    """The losses of which `denoising_loss` is the mean: a row for each noise level, a column for each image.

    Args:
        network, objective, source, seed, bf16, limit: as there.

    Returns:
        float64, the same on every rank.
    """
    device = next(network.parameters()).device
    count = len(source) if limit is None else min(limit, len(source))
    size = images_at_once(network)
    losses = torch.zeros(REPEATS, count, dtype=torch.float64, device=device)
    shared = in_group() and not is_spread(network)  # of a spread network every pass is one of all ranks
    first, ranks = (rank(), world_size()) if shared else (0, 1)
    starts = range(first * size, count, ranks * size)
    shortage = memory_for(f"the loss on {size} held-out images at once", REMEDY)
    total = REPEATS * sum(min(size, count - start) for start in starts)
    with meter("loss on held-out images", total, unit="noised images") as progress, shortage:
        for start in starts:
            columns = range(start, min(start + size, count))
            rows = [i * len(source) // count for i in columns]
            batch = source.batch(rows, device)  # once for all noise levels
            for repeat in range(REPEATS):
                random = StepRandom(seed, repeat, rows, device)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    losses[repeat, start : columns.stop] = objective.denoising(network, batch, random)
                progress.advance(len(columns))
    # each value is one rank's, and zero is added to it
    return sum_over_ranks(losses) if shared else losses


def images_at_once(network: nn.Module) -> int:
    """Images of one forward pass. Values of two sizes differ by rounding, so it depends on nothing but the network."""
    config = network.config
    numbers = (config["input_size"] // config["patch_size"]) ** 2 * config["hidden_size"]
    return max(1, min(BATCH, BATCH * LARGEST // numbers))

"""The loss itself as a measure: how well a network denoises held-out images."""

import torch
from torch import nn

from ditune.autoencoders import Autoencoder
from ditune.data import ImageDataset, from_uint8
from ditune.memory import memory_for
from ditune.objectives import Objective
from ditune.progress import meter
from ditune.rng import StepRandom

REPEATS = 4  # noise levels for each image
BATCH = 128
REMEDY = "What was trained is saved: free memory of the device, and resume=auto measures it again."


@torch.inference_mode()
def denoising_loss(
    network: nn.Module,
    objective: Objective,
    autoencoder: Autoencoder,
    images: ImageDataset,
    seed: int,
    bf16: bool,
) -> float:
    """Mean loss over the images, each at the same few timesteps with the same noise for every network.

    It is far less noisy than a distance of generated images. It does not see how errors add up over sampling steps.

    Args:
        network: in evaluation mode.
        objective, autoencoder: of its training; labels are dropped as there.
        images: usually a test split.
        seed: of timesteps, noise and label drop.
        bf16: the network runs under bf16 autocast.
    """
    device = next(network.parameters()).device
    autoencoder, losses = autoencoder.to(device), [[] for _ in range(REPEATS)]
    shortage = memory_for(f"the loss on {BATCH} held-out images at once", REMEDY)
    with meter("loss on held-out images", len(images)) as progress, shortage:
        for start in range(0, len(images), BATCH):
            rows = range(start, min(start + BATCH, len(images)))
            batch, y = images.__getitems__(rows)
            x0, y = autoencoder.to_latent(from_uint8(batch.to(device))), y.to(device)  # once for all noise levels
            for repeat in range(REPEATS):
                random = StepRandom(seed, repeat, rows, device)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    losses[repeat].append(objective.denoising(network, (x0, y), random))
            progress.advance(len(rows))
    return torch.cat([loss for repeat in losses for loss in repeat]).double().mean().item()

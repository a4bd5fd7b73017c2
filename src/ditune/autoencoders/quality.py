"""How much an autoencoder loses: reconstruction, and its peak signal-to-noise ratio."""

import torch
from torch import Tensor

from ditune.autoencoders.base import Autoencoder
from ditune.rng import generator

CHUNK = 256  # images encoded and decoded at once


@torch.no_grad()
def reconstruct(autoencoder: Autoencoder, pixels: Tensor, noise: float = 0.0, seed: int = 0) -> Tensor:
    """Encode and decode images.

    Args:
        autoencoder: its device is used.
        pixels: (N, 3, H, W) in [-1, 1].
        noise: standard deviation of Gaussian noise that is added to the latents, whose own is about 1.
        seed: of the noise.

    Returns:
        Pixels (N, 3, H, W) on the CPU, not clamped.
    """
    decoded, random = [], generator(seed)
    for x in pixels.split(CHUNK):
        z = autoencoder.to_latent(x.to(autoencoder.scale.device))  # (n, C, h, w)
        z = z + noise * torch.randn(z.shape, generator=random).to(z.device)
        decoded.append(autoencoder.to_pixels(z).cpu())
    return torch.cat(decoded)


def psnr(decoded: Tensor, original: Tensor) -> float | None:
    """Peak signal-to-noise ratio in dB: -10 log10 of the mean squared error over all pixels in [0, 1].

    The mean over images of each image's PSNR would be higher.

    Args:
        decoded: uint8 images (N, 3, H, W).
        original: likewise.

    Returns:
        None if the two are equal.
    """
    error = ((decoded.double() - original.double()) / 255).square().mean()
    return None if error == 0 else -10 * error.log10().item()

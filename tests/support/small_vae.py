"""A small VAE of the kind of Stable Diffusion's."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL


def small_vae(folder: Path) -> Path:
    """Four levels, as sd-vae-ft-*: 4 latents for 8 x 8 pixels."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
    )
    vae.save_pretrained(folder)
    return folder

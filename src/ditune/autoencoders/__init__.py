"""Autoencoders: pixels to latents and back."""

from ditune.autoencoders.base import Autoencoder
from ditune.autoencoders.kl import KL
from ditune.autoencoders.patch_pca import PatchPCA
from ditune.autoencoders.pixels import Pixels

__all__ = ["KL", "Autoencoder", "PatchPCA", "Pixels"]

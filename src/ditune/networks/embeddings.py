"""Embeddings of patch positions, timesteps and classes."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn


def sincos_1d(dim: int, position: Tensor) -> Tensor:
    """Sines, then cosines of positions at dim/2 frequencies 10000^(-2i/dim).

    Args:
        dim: width of the embedding, even.
        position: (M,).

    Returns:
        (M, dim) float64.
    """
    omega = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = position.double()[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_2d(dim: int, grid_size: int, scale: float = 1.0) -> Tensor:
    """Position table of a square grid, as in DiT (arXiv 2212.09748).

    The first half of an embedding encodes the column, the second half the row.

    Args:
        dim: width of the table, divisible by 4.
        grid_size: patches along one side.
        scale: factor on the coordinates. 0.5 keeps the coordinate range of pretraining for a grid that is twice as fine
            (DiffFit, arXiv 2304.06648, from 256 to 512 px).

    Returns:
        (grid_size^2, dim) float64, row by row.
    """
    coordinate = torch.arange(grid_size, dtype=torch.float64) * scale
    row, column = torch.meshgrid(coordinate, coordinate, indexing="ij")
    return torch.cat([sincos_1d(dim // 2, column.flatten()), sincos_1d(dim // 2, row.flatten())], dim=1)


def timestep_frequencies(dim: int, max_period: float = 10000.0) -> Tensor:
    """Frequencies max_period^(-2i/dim) of an embedding of width `dim`, (dim/2,) float32."""
    half = dim // 2
    return torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32) / half)


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0, frequencies: Tensor | None = None) -> Tensor:
    """Cosines, then sines of timesteps at dim/2 frequencies max_period^(-2i/dim).

    Args:
        t: (N,) timesteps; fractions are allowed.
        dim: width of the embedding. If it is odd, the last column is zero.
        max_period: of the slowest frequency, over 2 pi.
        frequencies: those of `timestep_frequencies` on the device of `t`; None = they are computed and moved there.

    Returns:
        (N, dim) float32.
    """
    if frequencies is None:
        frequencies = timestep_frequencies(dim, max_period).to(t.device)
    angle = t[:, None].float() * frequencies[None]
    embedding = torch.cat([angle.cos(), angle.sin()], dim=1)
    return nn.functional.pad(embedding, (0, dim % 2))


class PatchEmbed(nn.Module):
    """Image (N, C, H, W) to tokens (N, T, D): a convolution with stride = kernel size, as one matrix product.

    Args:
        patch_size: side of a patch, in latent pixels.
        in_channels: C.
        hidden_size: D.
    """

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, T, D)
        """Embed every patch, row by row."""
        patches = rearrange(x, "n c (h p) (w q) -> n (h w) (c p q)", p=self.patch_size, q=self.patch_size)
        return nn.functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Timestep (N,) to (N, D): sinusoids, then a two-layer MLP.

    Args:
        hidden_size: D.
        frequency_size: width of the sinusoids.
    """

    def __init__(self, hidden_size: int, frequency_size: int = 256):
        super().__init__()
        self.frequency_size = frequency_size
        self.register_buffer("frequencies", timestep_frequencies(frequency_size), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:  # (N,) -> (N, D)
        """Embed timesteps, or step sizes in the same unit."""
        return self.mlp(timestep_embedding(t, self.frequency_size, frequencies=self.frequencies))


class NoTime(nn.Module):
    """One trained vector, which the network sets to zero at first, in place of the embedding of a time that is missing.

    Args:
        hidden_size: D.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.vector = nn.Parameter(torch.empty(hidden_size))

    def forward(self, embedder: nn.Module, t: Tensor) -> Tensor:  # (N,) -> (N, D)
        """Embed timesteps; NaN is a missing one, and no gradient of it reaches the embedder."""
        missing = t.isnan()[:, None]
        return torch.where(missing, self.vector, embedder(t.nan_to_num()))


class LabelEmbedder(nn.Module):
    """Class (N,) to (N, D) by a table. Labels are dropped by the objective, not here.

    Args:
        num_classes: K.
        hidden_size: D.
        null_class: the table has an extra last row, K, for the null class.
    """

    def __init__(self, num_classes: int, hidden_size: int, null_class: bool):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(null_class), hidden_size)

    def forward(self, y: Tensor) -> Tensor:  # (N,) -> (N, D)
        """Look up the classes' rows."""
        return self.embedding_table(y)

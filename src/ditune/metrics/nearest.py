"""Nearest neighbours, which show memorised training images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ditune.errors import UserError


def nearest(queries: Tensor, references: Tensor, k: int = 1, chunk: int = 512) -> tuple[Tensor, Tensor]:
    """The k nearest references by cosine distance 1 - cos, in [0, 2].

    Args:
        queries: (N, D).
        references: (M, D).
        k: neighbours of each query.
        chunk: queries at once.

    Returns:
        Distances (N, k) float32, ascending, and indices (N, k).

    Raises:
        UserError: there are fewer than k references.
    """
    check_count(references, k)
    # float64: near 1 a float32 cosine has no digits left for the distance
    directions = F.normalize(references.double(), dim=1).T  # (D, M)
    found = [(F.normalize(rows.double(), dim=1) @ directions).topk(k) for rows in queries.split(chunk)]
    cosine, index = (torch.cat(parts) for parts in zip(*found, strict=True))
    return (1 - cosine).clamp(min=0).float(), index


def nearest_pixels(queries: Tensor, references: Tensor, k: int = 1, chunk: int = 512) -> tuple[Tensor, Tensor]:
    """The k nearest references by L2 distance of pixels in [0, 1].

    Args:
        queries: uint8 (N, ...).
        references: uint8 (M, ...).
        k: neighbours of each query.
        chunk: references at once.

    Returns:
        Distances (N, k) float64, ascending, and indices (N, k).

    Raises:
        UserError: there are fewer than k references.
    """
    check_count(references, k)
    rows = queries.flatten(1).double()  # (N, P): integers, so the expanded square below is exact in float64
    squares = []
    for part in references.flatten(1).split(chunk):
        columns = part.double()  # (chunk, P)
        squares.append(rows.square().sum(1, keepdim=True) + columns.square().sum(1) - 2 * rows @ columns.T)
    square, index = torch.cat(squares, dim=1).topk(k, largest=False)
    return square.sqrt() / 255, index


def check_count(references: Tensor, k: int) -> None:
    """Refuse to look for more neighbours than there are.

    Raises:
        UserError: there are fewer than k references.
    """
    if len(references) < k:
        raise UserError(f"{k} neighbours were asked for among {len(references)} images. Ask for fewer.")

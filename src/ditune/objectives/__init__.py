"""What is learned: how a batch becomes x_t, a target, a weight and a loss."""

from ditune.objectives.base import Loss, drop_labels
from ditune.objectives.gaussian_diffusion import GaussianDiffusion

__all__ = ["GaussianDiffusion", "Loss", "drop_labels"]

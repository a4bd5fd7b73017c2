"""What is learned: how a batch becomes x_t, a target, a weight and a loss."""

from ditune.objectives.base import Draws, Loss, Objective, State, drop_labels
from ditune.objectives.flow import FlowObjective, Targets
from ditune.objectives.flow_matching import FlowMatching
from ditune.objectives.gaussian_diffusion import GaussianDiffusion

__all__ = [
    "Draws",
    "FlowMatching",
    "FlowObjective",
    "GaussianDiffusion",
    "Loss",
    "Objective",
    "State",
    "Targets",
    "drop_labels",
]

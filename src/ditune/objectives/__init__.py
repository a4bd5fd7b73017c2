"""What is learned: how a batch becomes x_t, a target, a weight and a loss."""

from ditune.objectives.base import Draws, Loss, Objective, State, drop_labels
from ditune.objectives.consistency import ConsistencyDistillation, ConsistencyTraining
from ditune.objectives.flow import FlowObjective, Targets
from ditune.objectives.flow_matching import FlowMatching
from ditune.objectives.gaussian_diffusion import GaussianDiffusion
from ditune.objectives.live_reflow import LiveReflow
from ditune.objectives.progressive_distillation import ProgressiveDistillation
from ditune.objectives.shortcut import Shortcut

__all__ = [
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "Draws",
    "FlowMatching",
    "FlowObjective",
    "GaussianDiffusion",
    "LiveReflow",
    "Loss",
    "Objective",
    "ProgressiveDistillation",
    "Shortcut",
    "State",
    "Targets",
    "drop_labels",
]

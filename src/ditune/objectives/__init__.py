"""Training objectives: how a batch becomes x_t, a target, a weight and a loss."""

from ditune.objectives.alpha_flow import AlphaFlow
from ditune.objectives.base import Loss, Objective, State, drop_labels
from ditune.objectives.consistency import ConsistencyDistillation, ConsistencyTraining
from ditune.objectives.critic import Critic
from ditune.objectives.dense_teacher import DenseTeacher
from ditune.objectives.diff_tuning import DiffTuning
from ditune.objectives.diffusion import GaussianDiffusion
from ditune.objectives.dogfit import DogFit
from ditune.objectives.flow_base import FlowObjective, Targets
from ditune.objectives.flow_guided import FlowGuided
from ditune.objectives.flow_matching import FlowMatching
from ditune.objectives.live_reflow import LiveReflow
from ditune.objectives.mean_flow import MeanFlow
from ditune.objectives.noise_awareness import NoiseAwareness
from ditune.objectives.patches import Patches
from ditune.objectives.progressive_distillation import ProgressiveDistillation
from ditune.objectives.reflow import Reflow
from ditune.objectives.shortcut import Shortcut
from ditune.objectives.so_flow import SoFlow
from ditune.objectives.teacher import Teacher
from ditune.rng import Draws

__all__ = [
    "AlphaFlow",
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "Critic",
    "DenseTeacher",
    "DiffTuning",
    "DogFit",
    "Draws",
    "FlowGuided",
    "FlowMatching",
    "FlowObjective",
    "GaussianDiffusion",
    "LiveReflow",
    "Loss",
    "MeanFlow",
    "NoiseAwareness",
    "Objective",
    "Patches",
    "ProgressiveDistillation",
    "Reflow",
    "Shortcut",
    "SoFlow",
    "State",
    "Targets",
    "Teacher",
    "drop_labels",
]

"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512) on a flow, as the baseline of shortcut models."""

import torch
from torch import Tensor

from ditune.errors import require
from ditune.objectives.base import Network, State
from ditune.objectives.flow_base import FlowObjective, GuidedVelocity, Targets, levels_of, mean_of_two_steps
from ditune.processes import FlowProcess
from ditune.rng import StepRandom


class ProgressiveDistillation(FlowObjective):
    """The student matches two teacher steps with one; it then becomes the teacher and the step count halves.

    Training begins with a trained flow (`pretrained`) and has L = log2(M) equal parts. In the last part the student
    learns to generate in one step, and only in one. The teacher has the EMA weights of the part before.

    Args:
        process: the flow; `base_steps` is M.
        guidance: classifier-free guidance of the first teacher, the flow. Later teachers have learned it. 1 = none.
        clamp: the point between the teacher's steps is clamped to [-clamp, clamp] (4 in the code of arXiv 2410.12557);
            None = not.
        label_drop: must be 0, the student keeps its labels.

    Raises:
        UserError: `label_drop` is not 0, or the process has no finest step size.
    """

    has_teacher = True
    scheduled = True

    def __init__(
        self, process: FlowProcess, guidance: float = 1.0, clamp: float | None = None, label_drop: float = 0.0
    ):
        require(label_drop == 0, "objective.label_drop", label_drop, "Set objective.label_drop=0: labels are kept.")
        require(clamp is None or clamp > 0, "objective.clamp", clamp, "Set it above 0, or to null.")
        super().__init__(process, label_drop)
        self.finest, self.guidance, self.clamp = levels_of(process), guidance, clamp

    def level(self, step: int, max_steps: int) -> int:
        """The student's level, L - 1 in the first part of the training and 0 in the last: its step size is 2^-level.

        Args:
            step: optimizer step, from 0.
            max_steps: steps of the whole training.
        """
        return max(0, self.finest - 1 - step * self.finest // max_steps)

    def updates_teacher(self, step: int, max_steps: int) -> bool:
        """At the beginning of each part."""
        return step == 0 or self.level(step, max_steps) != self.level(step - 1, max_steps)

    def targets(self, network: Network, x0: Tensor, y: Tensor, random: StepRandom, state: State) -> Targets:
        """The mean velocity of two teacher steps, see `FlowObjective.targets`."""
        level = self.level(state.step, state.max_steps)
        d = torch.full((len(x0),), 2.0**-level, device=x0.device)
        t = 1 - (random.uniform("t").to(x0.device) * 2**level).floor().to(x0) * d
        x_t = self.process.x_t(x0, random.normal("noise", x0.shape[1:]).to(x0), t)
        guided = torch.full((len(y),), level == self.finest - 1)
        velocity = GuidedVelocity(self.process, state.teacher, y, self.guidance, guided, network.num_classes)
        target = mean_of_two_steps(velocity, x_t, t, d / 2, limit=self.clamp)
        return Targets(x_t, t, y, target, d)

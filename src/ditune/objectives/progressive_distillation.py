"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512) on a flow, as the baseline of shortcut models."""

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.objectives.base import Draws, Network, State
from ditune.objectives.flow_base import FlowObjective, Targets, levels_of, two_steps
from ditune.processes import FlowProcess


class ProgressiveDistillation(FlowObjective):
    """The network learns to do two steps of its teacher in one; then it is the teacher of half as many steps.

    It begins with a trained flow (`pretrained`) and goes through L = log2(M) equal parts of the training; in the last
    one it learns to draw in one step, and only in one. The teacher has the average of the part before.

    Args:
        process: the flow; `base_steps` is M.
        guidance: classifier-free guidance of the first teacher, the flow; later ones have learned it. 1 = none.
        clamp: hold the point between the teacher's steps in [-clamp, clamp] (4 in the code); None = not.
    """

    has_teacher = True
    scheduled = True

    def __init__(
        self, process: FlowProcess, guidance: float = 1.0, clamp: float | None = None, label_drop: float = 0.0
    ):
        if label_drop:
            raise UserError("A distilled network keeps its labels. Set objective.label_drop=0.")
        super().__init__(process, label_drop)
        self.finest, self.guidance, self.clamp = levels_of(process), guidance, clamp

    def level(self, step: int, max_steps: int) -> int:
        """The student's steps have the length 2^-level: L - 1 in the first part, 0 in the last."""
        return max(0, self.finest - 1 - step * self.finest // max_steps)

    def renews_teacher(self, step: int, max_steps: int) -> bool:
        return step == 0 or self.level(step, max_steps) != self.level(step - 1, max_steps)

    def targets(self, network: Network, x0: Tensor, y: Tensor, draws: Draws, state: State) -> Targets:
        level = self.level(state.step, state.max_steps)
        d = torch.full((len(x0),), 2.0**-level, device=x0.device)
        t = 1 - (draws.uniform("t").to(x0.device) * 2**level).floor().to(x0) * d
        x_t = self.process.x_t(x0, draws.normal("noise", x0.shape[1:]).to(x0), t)
        guided = torch.full_like(y, level == self.finest - 1, dtype=torch.bool)
        target = two_steps(
            *(self.process, state.teacher, x_t, t, y, d / 2, self.guidance, guided, network.num_classes, self.clamp)
        )
        return Targets(x_t, t, y, target, d)

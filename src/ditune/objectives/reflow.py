"""Reflow from a frozen teacher (Liu et al. 2022, arXiv 2209.03003), annealed (SlimFlow, Zhu et al. 2024, 2407.12718).

A pair is noise z and the latent x that the teacher's ODE generates from it. Reflow is flow matching on pairs: the paths
of two pairs do not cross, so the learned flow is straighter and needs fewer steps. Annealing begins with random pairs,
which suits a student that does not start as the teacher.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ditune.errors import require
from ditune.objectives.base import Network, State
from ditune.objectives.flow_base import FlowObjective, GuidedVelocity, Targets
from ditune.objectives.pairs import Pairs
from ditune.objectives.teacher import Teacher
from ditune.processes import FlowProcess
from ditune.rng import StepRandom

# b(k / K): how much of the noise is new, from 1 = all to 0 = none
ANNEAL: dict[str, Callable[[float], float]] = {
    "none": lambda _: 0.0,
    "linear": lambda share: 1 - min(1.0, share),
    "cosine": lambda share: (1 + math.cos(math.pi * min(1.0, share))) / 2,
    "exponential": lambda share: math.exp(-share),
}


class FromPairs(FlowObjective):
    """What Reflow and FlowGuided share: pairs, from files or made in every step by the teacher.

    Args:
        process: the flow of the student.
        pairs: folder of pairs, see `Pairs`; None = the teacher makes them from the noise and the labels of each batch.
        teacher: run folder or network file of a frozen network of any shape; None = the pretrained network as it was
            before the training.
        steps: Euler steps of a pair that the teacher makes.
        guidance: classifier-free guidance of these steps; 1 = none. In stored pairs it is that of their making.
        label_drop: must be 0, the guidance is in the pairs.

    Raises:
        UserError: a number out of range.
    """

    def __init__(
        self,
        process: FlowProcess,
        pairs: str | None = None,
        teacher: str | None = None,
        steps: int = 8,
        guidance: float = 1.0,
        label_drop: float = 0.0,
    ):
        remedy = "Set objective.label_drop=0: labels are kept, and the guidance is in the pairs."
        require(label_drop == 0, "objective.label_drop", label_drop, remedy)
        require(steps >= 1, "objective.steps", steps, "Set it to 1 or more.")
        super().__init__(process, label_drop)
        self.pairs_folder, self.teacher_file, self.steps, self.guidance = pairs, teacher, steps, guidance
        self.pairs: Pairs | None = None  # once they have been read; plans are made before
        self.teacher: Teacher | None = None  # likewise

    @property
    def asks_teacher(self) -> bool:
        """Whether the loss calls the teacher."""
        return self.pairs_folder is None

    @property
    def needs_base(self) -> bool:
        """Whether the pretrained network is the teacher."""
        return self.asks_teacher and self.teacher_file is None

    def velocity_of(self, state: State, y: Tensor, guidance: float, null_class: int) -> GuidedVelocity:
        """The teacher's velocity for labels y (N,), with classifier-free guidance."""
        guided = torch.ones(len(y), dtype=torch.bool)
        process, network = (self.process, state.base) if self.teacher is None else (self.teacher.process, self.teacher)
        return GuidedVelocity(process, network, y, guidance, guided, null_class)

    def pair(
        self, x0: Tensor, y: Tensor, random: StepRandom, state: State, null_class: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A pair for each sample of the batch.

        Args:
            x0: (N, C, H, W) data, of which only the shape is used.
            y: (N,) labels.
            random: random numbers of these samples at this step.
            state: gives the pretrained network.
            null_class: label of the null class.

        Returns:
            z and x (N, C, H, W), and labels (N,).
        """
        if self.pairs is not None:
            rows = random.on_cpu.integers("pair", len(self.pairs))
            found = self.pairs.noise(rows.tolist()), self.pairs.latents(rows.tolist()), self.pairs.labels[rows]
            z, x, y = (value.to(x0.device, non_blocking=True) for value in found)
            return z.to(x0), x.to(x0), y
        z = random.normal("pair", x0.shape[1:]).to(x0)
        if not self.asks_teacher:
            return z, x0, y  # of a plan, which is made before the files are read
        return z, euler(self.velocity_of(state, y, self.guidance, null_class), self.process, z, self.steps), y


class Reflow(FromPairs):
    """Flow matching from annealed noise z' = sqrt(1 - b^2) z + b epsilon to x, with b from 1 to 0 over the training.

    b = 1 is flow matching on the teacher's latents, b = 0 is reflow.

    Args:
        anneal: schedule of b at step k, with K the steps of `anneal_share`: 'none' (b = 0), 'linear' 1 - min(1, k / K),
            'cosine' (1 + cos(pi min(1, k / K))) / 2, 'exponential' e^(-k / K).
        anneal_share: K as a share of the training, above 0 and at most 1.
        process, others: see `FromPairs`.

    Raises:
        UserError: an unknown name, or a number out of range.
    """

    def __init__(self, process: FlowProcess, anneal: str = "none", anneal_share: float = 0.375, **others: object):
        super().__init__(process, **others)
        require(anneal in ANNEAL, "objective.anneal", anneal, f"Choose one of {', '.join(ANNEAL)}.")
        remedy = "Set it above 0 and at most to 1."
        require(0 < anneal_share <= 1, "objective.anneal_share", anneal_share, remedy)
        self.anneal, self.anneal_share = anneal, anneal_share

    @property
    def scheduled(self) -> bool:
        """Whether b depends on the length of the training."""
        return self.anneal != "none"

    def new_noise(self, state: State) -> float:
        """b in [0, 1] at this step."""
        return ANNEAL[self.anneal](state.step / (self.anneal_share * state.max_steps))

    def targets(self, network: Network, x0: Tensor, y: Tensor, random: StepRandom, state: State) -> Targets:
        """z' - x on the straight path from x to z' (2407.12718, eq. 9), see `FlowObjective.targets`."""
        z, x, y = self.pair(x0, y, random, state, network.num_classes)
        b = self.new_noise(state)
        if b > 0:
            z = annealed(z, random.normal("noise", x0.shape[1:]).to(x0), b)
        t = random.on_cpu.uniform("t").to(x0.dtype).to(x0.device, non_blocking=True)
        return Targets(self.process.x_t(x, z, t), t, y, self.process.target(x, z, t))


def annealed(z: Tensor, noise: Tensor, b: float) -> Tensor:
    """sqrt(1 - b^2) z + b noise, (N, C, H, W) each; the noise itself at b = 1."""
    return math.sqrt(1 - b * b) * z + b * noise if b < 1 else noise


@torch.no_grad()
def euler(velocity: GuidedVelocity, process: FlowProcess, x: Tensor, steps: int) -> Tensor:  # (N, C, H, W)
    """The end of the path that begins at x (N, C, H, W), noise, by Euler's method."""
    for t in process.in_steps(steps).times()[:-1].tolist():
        x = x - velocity(x, torch.full((len(x),), t, device=x.device)) / steps
    return x

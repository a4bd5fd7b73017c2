"""Shortcut models (Frans et al. 2024, arXiv 2410.12557): one network that generates in 1, 2, 4 ... 128 steps.

The network is conditioned on the step size d and learns the mean velocity over the step. Most samples are flow
matching, at the finest level. The others are bootstrapped: one step of size d must end where two steps of d/2 end,

    u(x_t, t, d) = sg (u(x_t, t, d/2) + u(x', t - d/2, d/2)) / 2    with x' = x_t - d/2 u(x_t, t, d/2).

Levels: d = 2^-level for level 0 (one step) to L = log2(M). Level L means the instantaneous velocity.
"""

import torch
from torch import Tensor

from ditune.errors import UserError, require
from ditune.objectives.base import Network, State, drop_labels
from ditune.objectives.flow_base import (
    FlowObjective,
    GuidedVelocity,
    Targets,
    called_rows,
    clamp,
    levels_of,
    mean_of_two_steps,
)
from ditune.processes import FlowProcess
from ditune.rng import StepRandom

LEVELS = ("spread", "uniform", "code")
TARGETS = ("ema", "live")


class Shortcut(FlowObjective):
    """Flow matching at the finest level and self-consistency at all coarser ones.

    Args:
        process: the flow; its network is conditioned on step sizes of at least 1/M (`base_steps`).
        bootstrap_every: every k-th sample uses the bootstrap target (k = 4 in the paper, 8 in the code).
        levels: of the bootstrapped samples. 'spread': in turn across optimizer steps too, so that every level is
            trained at every batch size. 'uniform': random. 'code': the code's list, the same at each optimizer step. It
            needs at least L bootstrapped samples in a batch; with fewer the code trains only d = 1.
        dt_bias: with levels='code', more samples of d = 1 and d = 1/2 (the code's `bootstrap_dt_bias`).
        target: network of the two half steps: 'ema', or 'live' for the network in training.
        guidance: classifier-free guidance of the half steps at the finest level. Coarser levels inherit it, so sampling
            in fewer than M steps needs no guidance. 1 = none.
        clamp: the point between the half steps, and the target, are clamped to [-clamp, clamp] (4 in the code);
            None = not.
        label_drop: share of labels that are replaced by the null class at the finest level. Bootstrapped samples keep
            their labels, unless it is 1, which trains without classes.

    Raises:
        UserError: an unknown name, a number out of range, or a process without step sizes.
    """

    any_path = True

    def __init__(
        self,
        process: FlowProcess,
        bootstrap_every: int = 4,
        levels: str = "spread",
        dt_bias: bool = False,
        target: str = "ema",
        guidance: float = 1.0,
        clamp: float | None = None,
        label_drop: float = 0.1,
    ):
        super().__init__(process, label_drop)
        require(levels in LEVELS, "objective.levels", levels, f"Choose one of {', '.join(LEVELS)}.")
        require(target in TARGETS, "objective.target", target, f"Choose one of {', '.join(TARGETS)}.")
        remedy = "Shortcut models are conditioned on the step size: set objective.process.step to log2 or size."
        require(process.step != "none", "objective.process.step", process.step, remedy)
        require(bootstrap_every >= 1, "objective.bootstrap_every", bootstrap_every, "Set it to 1 or more.")
        require(clamp is None or clamp > 0, "objective.clamp", clamp, "Set it above 0, or to null.")
        remedy = "It is an option of levels=code: set objective.levels=code, or objective.dt_bias=false."
        require(levels == "code" or not dt_bias, "objective.dt_bias", dt_bias, remedy)
        self.finest = levels_of(process)  # L
        self.bootstrap_every, self.levels, self.dt_bias = bootstrap_every, levels, dt_bias
        self.target, self.guidance, self.clamp = target, guidance, clamp

    def check(self, batch_size: int) -> None:
        """Refuse a batch in which levels='code' would train only d = 1.

        Args:
            batch_size: samples of the global batch.

        Raises:
            UserError: the batch is too small.
        """
        smallest = self.bootstrap_every * self.finest * (2 if self.dt_bias else 1)
        if self.levels == "code" and batch_size < smallest:
            raise UserError(
                f"batch_size is {batch_size}, and with objective.levels=code all its bootstrapped samples have d = 1: "
                f"finer steps are never trained. Set objective.levels=spread, or batch_size to {smallest} or more."
            )

    def sample_levels(self, random: StepRandom, state: State) -> Tensor:  # (N,) int64
        """Level of each sample: below L for bootstrapped samples, L for flow matching.

        Every `bootstrap_every`-th position is bootstrapped, so every rank and micro-step has its share.
        """
        every, size = self.bootstrap_every, state.batch_size
        levels = [self.finest] * len(random.positions)
        if self.levels == "spread":
            counts = [state.step * size + position for position in random.positions]
            turns = {row: count // every for row, count in enumerate(counts) if count % every == 0}
            chosen = {row: self.finest - 1 - turn % self.finest for row, turn in turns.items()}
        else:
            share = size // every
            turns = {row: p // every for row, p in enumerate(random.positions) if p % every == 0 and p // every < share}
            listed = code_levels(share, self.finest, self.dt_bias)
            uniform = random.on_cpu.integers("level", self.finest).tolist() if self.levels == "uniform" else None
            chosen = {row: listed[turn] if uniform is None else uniform[row] for row, turn in turns.items()}
        for row, level in chosen.items():
            levels[row] = level
        return torch.tensor(levels)

    def targets(self, network: Network, x0: Tensor, y: Tensor, random: StepRandom, state: State) -> Targets:
        """Flow matching, and the bootstrap target where it applies, see `FlowObjective.targets`."""
        levels = self.sample_levels(random, state)  # on the CPU
        level = levels.to(x0.device, non_blocking=True)
        d = torch.exp2(-level.to(x0.dtype))
        t = 1 - (random.uniform("t").to(x0.device) * 2**level).floor().to(x0) * d  # 1, 1 - d, ... d
        noise = random.normal("noise", x0.shape[1:]).to(x0)
        bootstrapped = level < self.finest
        null = network.num_classes
        y = torch.where(bootstrapped & (self.label_drop < 1), y, drop_labels(y, random, self.label_drop, null))
        x_t, target = self.process.x_t(x0, noise, t), self.process.target(x0, noise, t)
        chosen = (levels < self.finest).nonzero()[:, 0]
        called = called_rows(chosen)
        if len(called):
            rows, given = (part.to(x0.device, non_blocking=True) for part in (chosen, called))
            teacher = state.ema if self.target == "ema" else network
            guided = levels[called] == self.finest - 1  # their half steps are flow matching, the others have learned it
            velocity = GuidedVelocity(self.process, teacher, y[given], self.guidance, guided, null)
            mean = mean_of_two_steps(velocity, x_t[given], t[given], d[given] / 2, limit=self.clamp)
            target = target.index_copy(0, rows, clamp(mean[: len(rows)], self.clamp))
        return Targets(x_t, t, y, target, d)


def code_levels(count: int, finest: int, dt_bias: bool) -> list[int]:
    """Levels of `count` bootstrapped samples in the code of arXiv 2410.12557: equal shares, the remainder gets d = 1.

    Args:
        count: number of bootstrapped samples in the global batch.
        finest: L.
        dt_bias: a quarter each for d = 1 and d = 1/2, equal shares of the rest.
    """
    if dt_bias:
        listed = [level for level in range(finest - 1, 1, -1) for _ in range(count // 2 // finest)]
        listed += [1] * (count // 4) + [0] * (count // 4)
    else:
        listed = [level for level in range(finest - 1, -1, -1) for _ in range(count // finest)]
    return listed + [0] * (count - len(listed))

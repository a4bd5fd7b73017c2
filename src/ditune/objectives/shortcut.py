"""Shortcut models (Frans et al. 2024, arXiv 2410.12557): one network that draws in 1, 2, 4 ... 128 steps.

The network is told the length d of its step and learns the mean velocity over it. Most samples are flow matching, at
the finest level; the others are bootstrapped: a step of length d must end where two steps of d/2 end.
Levels: d = 2^-level for level 0 (one step) to L = log2(M); level L stands for the velocity itself.
"""

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.objectives.base import Draws, Network, State, drop_labels
from ditune.objectives.flow_base import FlowObjective, Targets, at_most, levels_of, two_steps
from ditune.processes import FlowProcess

LEVELS = ("spread", "uniform", "code")
TARGETS = ("ema", "live")


class Shortcut(FlowObjective):
    """Flow matching at the finest level and self-consistency at all coarser ones.

    Args:
        process: the flow; its network is told steps, of at least 1/M (`base_steps`).
        bootstrap_every: one sample in so many is bootstrapped: 4 in the paper, 8 in its code.
        levels: of the bootstrapped samples. 'spread': in turn, over the steps too, so that every level is trained at
            every batch size. 'uniform': drawn, as the paper is said to; 'code': the code's list, the same in each step;
            needs L bootstrapped samples in a batch, for smaller ones the code trains nothing but d = 1.
        dt_bias: with levels='code', more samples of d = 1 and d = 1/2 (`bootstrap_dt_bias` there).
        target: whose two half steps are the target: 'ema', or the 'live' network.
        guidance: classifier-free guidance of the half steps at the finest level, which coarser levels inherit; then
            none is needed for drawing in fewer than M steps. 1 = none.
        clamp: hold the point between the half steps, and the target, in [-clamp, clamp] (4 in the code); None = not.
        label_drop: share of labels replaced by the null class at the finest level; bootstrapped samples keep theirs
            unless it is 1, which trains without classes.

    Raises:
        UserError: unknown names, or a process whose network is not told steps.
    """

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
        for name, value, known in [("levels", levels, LEVELS), ("target", target, TARGETS)]:
            if value not in known:
                raise UserError(f"Shortcut models know no {name} {value!r}. Choose one of {', '.join(known)}.")
        if process.step == "none":
            raise UserError("A shortcut network must be told its steps. Set objective.process.step to log2 or size.")
        if bootstrap_every < 1 or (clamp is not None and clamp <= 0):
            raise UserError("Nothing is bootstrapped so. Set bootstrap_every to 1 or more, clamp above 0 or to null.")
        if dt_bias and levels != "code":
            raise UserError("dt_bias belongs to the code's levels. Set objective.levels=code, or dt_bias=false.")
        self.finest = levels_of(process)  # L
        self.bootstrap_every, self.levels, self.dt_bias = bootstrap_every, levels, dt_bias
        self.target, self.guidance, self.clamp = target, guidance, clamp

    def check(self, batch_size: int) -> None:
        """Refuse a batch in which the code's list of levels would hold only d = 1."""
        smallest = self.bootstrap_every * self.finest * (2 if self.dt_bias else 1)
        if self.levels == "code" and batch_size < smallest:
            raise UserError(
                f"In a batch of {batch_size} the code's levels are all d = 1: its finer steps are never trained. "
                f"Set objective.levels=spread, or batch_size to {smallest} or more."
            )

    def draw_levels(self, draws: Draws, state: State) -> Tensor:  # (N,) int64, L where flow matching is learned
        """Every `bootstrap_every`-th position is bootstrapped, so every rank and micro-step has its share."""
        every, size = self.bootstrap_every, state.batch_size
        levels = [self.finest] * len(draws.positions)
        if self.levels == "spread":
            counts = [state.step * size + position for position in draws.positions]
            turns = {row: count // every for row, count in enumerate(counts) if count % every == 0}
            chosen = {row: self.finest - 1 - turn % self.finest for row, turn in turns.items()}
        else:
            share = size // every
            turns = {row: p // every for row, p in enumerate(draws.positions) if p % every == 0 and p // every < share}
            listed = code_levels(share, self.finest, self.dt_bias)
            drawn = draws.integers("level", self.finest).tolist() if self.levels == "uniform" else None
            chosen = {row: listed[turn] if drawn is None else drawn[row] for row, turn in turns.items()}
        for row, level in chosen.items():
            levels[row] = level
        return torch.tensor(levels)

    def targets(self, network: Network, x0: Tensor, y: Tensor, draws: Draws, state: State) -> Targets:
        level = self.draw_levels(draws, state).to(x0.device)
        d = torch.exp2(-level.to(x0.dtype))
        t = 1 - (draws.uniform("t").to(x0.device) * 2**level).floor().to(x0) * d  # 1, 1 - d, ... d
        noise = draws.normal("noise", x0.shape[1:]).to(x0)
        bootstrapped = level < self.finest
        null = network.num_classes
        y = torch.where(bootstrapped & (self.label_drop < 1), y, drop_labels(y, draws, self.label_drop, null))
        x_t, target = self.process.x_t(x0, noise, t), self.process.target(x0, noise)
        rows = bootstrapped.nonzero()[:, 0]
        if len(rows):
            teacher = state.ema if self.target == "ema" else network
            guided = level[rows] == self.finest - 1
            mean = two_steps(
                *(self.process, teacher, x_t[rows], t[rows], y[rows], d[rows] / 2),
                *(self.guidance, guided, null, self.clamp),
            )
            target = target.index_copy(0, rows, at_most(mean, self.clamp))
        return Targets(x_t, t, y, target, d)


def code_levels(count: int, finest: int, dt_bias: bool) -> list[int]:
    """Levels of `count` bootstrapped samples as the code lists them: equal shares, and d = 1 for what is left over."""
    if dt_bias:
        listed = [level for level in range(finest - 1, 1, -1) for _ in range(count // 2 // finest)]
        listed += [1] * (count // 4) + [0] * (count // 4)
    else:
        listed = [level for level in range(finest - 1, -1, -1) for _ in range(count // finest)]
    return listed + [0] * (count - len(listed))

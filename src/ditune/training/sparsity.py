"""Training towards zeros: hard masks (FedSparsify, arXiv 2204.12430) and straight-through ones (SparseDM, 2404.10445).

Between two steps the network and its average always hold the masked weights, so that everything that computes with
them, saves or loads them needs to know nothing of masks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ditune.errors import require
from ditune.training.masks import SCOPES, chosen, masks, parsed, zeros

WAYS = ("hard", "ste")
SCHEDULES = ("constant", "cubic", "progressive")
STAGES = ("8:8", "6:8", "5:8", "4:8", "2:4")  # of SparseDM's progressive training

Amount = tuple[int, int] | float  # n and m, or the share of the weights that are zero


class Sparsity:
    """Which of the trained weights are zero, and how the others train.

    Args:
        pattern: 'n:m' keeps the n largest of every m inputs, 'unstructured' the largest of all.
        target: regular expression of whole names of trained parameters; None = the matrices of attention and MLP.
        scope: of 'unstructured': 'global' compares all targets with each other, 'layer' each with itself.
        way: 'hard': masked weights and their gradients are zero, and masks only shrink. 'ste' (straight-through, with
            SR-STE's decay): dense weights train under the mask of their own values, which may come back.
        final: s_f, share of the weights that are zero at the end of 'unstructured', in [0, 1); 0 = plain training.
        schedule: 'constant': all at the step `start`. 'cubic': of 'unstructured',
            s_t = s_f - s_f (1 - (t - start) / (end - start))^power. 'progressive': `stages` one after another.
        start, end: optimizer steps between which the schedule moves; `end` is not used by 'constant'.
        every: steps between two changes of the share.
        power: of 'cubic'; 3 in the paper, 1 = linear.
        stages: patterns n:m of 'progressive', for equal parts of start..end; the last must be `pattern`.
        decay: lambda of SR-STE (arXiv 2102.04010): masked weights get lambda w added to their gradient.
        teacher: weight of the dense network's term in the loss, see `ditune.objectives.DenseTeacher`; 0 = none.

    Raises:
        UserError: an unknown name, a number out of range, or a schedule that does not suit the pattern.
    """

    def __init__(
        self,
        pattern: str = "2:4",
        target: str | None = None,
        scope: str = "global",
        way: str = "hard",
        final: float = 0.5,
        schedule: str = "constant",
        start: int = 0,
        end: int = 1,
        every: int = 1,
        power: float = 3.0,
        stages: Sequence[str] = STAGES,
        decay: float = 2e-4,
        teacher: float = 0.0,
    ):
        self.structure = parsed(pattern)
        require(scope in SCOPES, "sparsity.scope", scope, f"Choose one of {', '.join(SCOPES)}.")
        require(way in WAYS, "sparsity.way", way, f"Choose one of {', '.join(WAYS)}.")
        require(0 <= final < 1, "sparsity.final", final, "Set it to 0 or more and below 1.")
        require(schedule in SCHEDULES, "sparsity.schedule", schedule, f"Choose one of {', '.join(SCHEDULES)}.")
        suits = schedule == "constant" or (schedule == "cubic") == (self.structure is None)
        remedy = "Set cubic for pattern=unstructured, progressive for n:m, or constant."
        require(suits, "sparsity.schedule", schedule, remedy)
        require(start >= 0, "sparsity.start", start, "Set it to 0 or more.")
        moves = schedule != "constant"
        require(not moves or end > start, "sparsity.end", end, f"Set it above sparsity.start={start}.")
        require(every >= 1, "sparsity.every", every, "Set it to 1 or more.")
        require(power > 0, "sparsity.power", power, "Set it above 0.")
        require(decay >= 0, "sparsity.decay", decay, "Set it to 0 or more.")
        require(teacher >= 0, "sparsity.teacher", teacher, "Set it to 0 or more.")
        self.stages = [parsed(stage, "sparsity.stages") for stage in stages]
        last = self.stages[-1] if schedule == "progressive" and self.stages else self.structure
        require(last == self.structure, "sparsity.stages", list(stages), f"Let it end with {pattern}.")
        kept = [n / m for n, m in filter(None, self.stages)]
        falling = len(kept) == len(self.stages) and kept == sorted(kept, reverse=True)
        require(falling, "sparsity.stages", list(stages), "Give patterns n:m that keep less and less.")
        self.pattern, self.target, self.scope, self.way, self.final = pattern, target, scope, way, final
        self.schedule, self.start, self.end, self.every, self.power = schedule, start, end, every, power
        self.decay, self.teacher, self.step = decay, teacher, 0
        self.applied: Amount | None = None  # the amount of the 'hard' masks
        self.masks: dict[str, Tensor] = {}  # of the weights; empty = all stay
        self.dense: dict[str, Tensor] = {}  # of 'ste': what the masks were made of
        self.dense_average: dict[str, Tensor] = {}  # likewise, of the average
        self._begun = False

    def amount(self, step: int) -> Amount | None:
        """The pattern or share at a step.

        Args:
            step: optimizer steps that are done.

        Returns:
            n and m, or the share; None = no weight is masked.
        """
        if step < self.start:
            return None
        done = min(max(step - self.start, 0) / max(self.end - self.start, 1), 1.0)
        if self.structure is not None:
            stage = min(int(done * len(self.stages)), len(self.stages) - 1)
            n, m = self.stages[stage] if self.schedule == "progressive" else self.structure
            return None if n == m else (n, m)
        if self.schedule == "cubic" and step < self.end:
            held = step // self.every * self.every  # t' = f floor(t / f)
            left = 1 - (held - self.start) / (self.end - self.start)
            share = self.final - self.final * left**self.power
        else:
            share = self.final
        return share if share > 0 else None

    def targets(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that are masked, of those that train; see `ditune.training.masks.chosen`.

        Raises:
            UserError: none is, or a shape does not suit the pattern.
        """
        if self.structure is None:
            return chosen(parameters, self.target, None)
        stages = self.stages if self.schedule == "progressive" else []
        return chosen(parameters, self.target, max(m for _, m in (*stages, self.structure)))

    # In a training, in this order: begin, then of every step `of_gradients`, `open` and `close`

    @torch.no_grad()
    def begin(self, trained: Mapping[str, nn.Parameter], average: Mapping[str, Tensor]) -> None:
        """The weights lie on their device: mask those of a new training, or go on with those of a checkpoint."""
        device = next(iter(trained.values())).device
        for kept in (self.masks, self.dense, self.dense_average):
            kept.update({name: value.to(device) for name, value in kept.items()})
        if self._begun:
            if self.way == "ste" and self.dense:
                self.masks = masks(self.dense, self.amount(self.step), self.scope)
        else:
            self._begun = True
            self.close(trained, average, 0)

    @torch.no_grad()
    def of_gradients(self, trained: Mapping[str, nn.Parameter]) -> None:
        """Change the gradients of a step: zero where 'hard' masks are; with SR-STE's decay there for 'ste'."""
        for name, mask in self.masks.items():
            gradient = trained[name].grad
            if gradient is None:
                continue
            if self.way == "hard":
                gradient *= mask
            else:  # dL/dw = dL/d(w mask) + lambda (1 - mask) w  (arXiv 2102.04010)
                gradient += self.decay * (~mask * self.dense[name])

    @torch.no_grad()
    def open(self, trained: Mapping[str, nn.Parameter], average: Mapping[str, Tensor]) -> None:
        """Before the update: 'ste' updates and averages the dense weights."""
        for name, value in self.dense.items():
            trained[name].copy_(value)
            average[name].copy_(self.dense_average[name])

    @torch.no_grad()
    def close(self, trained: Mapping[str, nn.Parameter], average: Mapping[str, Tensor], step: int) -> None:
        """After the update and the average's: mask both.

        Args:
            trained, average: by name; their values change.
            step: optimizer steps that are done.
        """
        self.step = step
        amount = self.amount(step)
        if amount is None and not self.masks:
            return
        weights = self.targets(trained)
        averages = {name: average[name] for name in weights}
        if self.way == "ste":
            _copy(weights, self.dense)
            _copy(averages, self.dense_average)
            self.masks = masks(weights, amount, self.scope)
            of_average = masks(averages, amount, self.scope)  # by its own values, as if it were trained
        else:
            if amount != self.applied:
                self.applied = amount
                for name, mask in masks(weights, amount, self.scope).items():
                    self.masks[name] = mask & self.masks.get(name, torch.ones_like(mask))
            of_average = self.masks
        for name, weight in weights.items():
            weight *= self.masks[name]  # Adam's and Muon's updates have moved what had no gradient
            averages[name] *= of_average[name]

    def memory(self, trained: Mapping[str, Tensor]) -> int:
        """Bytes on the device besides those of a dense training.

        Args:
            trained: what trains, by name; only shapes are asked.
        """
        of_teacher = sum(4 * w.numel() for w in trained.values()) if self.teacher else 0  # `ditune.peft.Off` keeps them
        if self.amount(max(self.start, self.end)) is None:
            return of_teacher
        of_weight = 1 + (2 * 4 if self.way == "ste" else 0)  # the mask; the dense weight and its average in fp32
        return of_teacher + of_weight * sum(w.numel() for w in self.targets(trained).values())

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the masks, which a weight of zero does not tell; of 'ste' the dense weights."""
        state = {"step": self.step, "masks": self.masks if self.way == "hard" else {}}
        state |= {"dense": self.dense, "average": self.dense_average}
        return {
            key: {name: v.cpu().clone() for name, v in value.items()} if isinstance(value, dict) else value
            for key, value in state.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`, before `begin`."""
        self.step, self.masks, self._begun = state["step"], dict(state["masks"]), True
        self.applied = self.amount(self.step)
        self.dense, self.dense_average = dict(state["dense"]), dict(state["average"])

    def facts(self, trained: Mapping[str, Tensor]) -> dict[str, Any]:
        """What a file says of its zeros: the pattern, and their numbers by name.

        Args:
            trained: the weights that are saved, by name.
        """
        return {"pattern": self.pattern, "zeros": zeros(self.targets(trained))}


def _copy(values: Mapping[str, Tensor], kept: dict[str, Tensor]) -> None:
    """Copy values into what is kept of them, which is made the first time."""
    for name, value in values.items():
        if name in kept:
            kept[name].copy_(value)
        else:
            kept[name] = value.detach().clone()

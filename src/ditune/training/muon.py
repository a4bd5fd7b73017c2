"""Muon for the matrices inside the blocks, AdamW for everything else, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from ditune.errors import UserError


class StackedMuon(Muon):
    """torch's Muon for matrices (A, B) and for stacks of them (E, A, B), each of which is made orthogonal by itself.

    torch does that in bf16. On a CPU it is done in fp32: many CPUs emulate bf16, which takes ten times as long, and all
    CPUs shall give the same weights but for rounding. Updates are matched to AdamW's RMS (arXiv 2502.16982).

    Args:
        parameters: matrices and stacks of them.
        lr, weight_decay, momentum: of torch's Muon.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0, momentum: float = 0.95
    ):
        super().__init__([torch.empty(0, 0)], lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw")
        self.param_groups[0]["params"] = list(parameters)  # the constructor would refuse stacks

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        (group,) = self.param_groups
        if group["params"][0].device.type != "cpu":
            return super().step(closure)
        loss = closure() if closure is not None else None
        momentum, lists = group["momentum"], ([], [], [])
        super()._init_group(group, *lists)
        for w, gradient, m in zip(*lists, strict=True):  # (..., A, B) each
            m.lerp_(gradient, 1 - momentum)
            update = orthogonal(gradient.lerp(m, momentum), group["ns_coefficients"], group["ns_steps"], group["eps"])
            w.mul_(1 - group["lr"] * group["weight_decay"])
            w.add_(update, alpha=-group["lr"] * 0.2 * max(w.shape[-2:]) ** 0.5)
        return loss

    def _init_group(self, group: Any, *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)  # parameters, gradients and momenta, in the same order
        for tensors in lists:
            tensors[:] = [matrix for t in tensors for matrix in (t.unbind() if t.ndim == 3 else (t,))]
        return has_complex


def orthogonal(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Matrices with the singular vectors of `x` and singular values near 1, by Newton and Schulz's iteration.

    Args:
        x: (..., A, B), each matrix by itself.
        coefficients: a, b, c of x <- a x + b (x x^T) x + c (x x^T)^2 x.
        steps: how often.
        eps: least norm that is divided by.
    """
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x if wide else x.mT


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) beside AdamW, both torch's.

    Muon suits hidden matrices; embeddings, modulations, the output and all vectors are AdamW's, as its author advises.

    Args:
        named_parameters: (name, parameter) of what trains.
        lr: of AdamW.
        muon_lr: of Muon, on AdamW's scale (updates are matched to its RMS, arXiv 2502.16982).
        weight_decay, betas: of AdamW; Muon has the same weight decay.
        momentum: of Muon.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        muon_lr: float,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        momentum: float = 0.95,
    ):
        named = list(named_parameters)
        matrices = [p for n, p in named if _is_hidden_matrix(n, p)]
        others = [p for n, p in named if not _is_hidden_matrix(n, p)]
        if not matrices or not others:
            raise UserError(
                "Muon trains whole networks, and this method trains none of the matrices. Set optimizer=adamw."
            )
        self.parts = (
            StackedMuon(matrices, muon_lr, weight_decay, momentum),
            AdamW(others, lr, tuple(betas), weight_decay=weight_decay, fused=True),
        )
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        loss = closure() if closure is not None else None
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state  # loading a checkpoint replaces both
            part.step()
        return loss


def _is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    inside = name.startswith("blocks.") and "adaLN" not in name
    return inside and parameter.ndim == (3 if ".experts." in name else 2)  # experts' stacked biases have two dimensions

"""Muon for the matrices inside the blocks, AdamW for everything else, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from ditune.errors import UserError


class StackedMuon(Muon):
    """torch's Muon for matrices (A, B) and for stacks of them (E, A, B), each of which is made orthogonal by itself."""

    def __init__(self, parameters: Iterable[nn.Parameter], *args: Any, **kwargs: Any):
        parameters = list(parameters)
        super().__init__([torch.empty(0, 0)], *args, **kwargs)  # it would refuse stacks
        self.param_groups[0]["params"] = parameters

    def _init_group(self, group: Any, *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)  # parameters, gradients and momenta, in the same order
        for tensors in lists:
            tensors[:] = [matrix for t in tensors for matrix in (t.unbind() if t.ndim == 3 else (t,))]
        return has_complex


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
            StackedMuon(matrices, muon_lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw"),
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

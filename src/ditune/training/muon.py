"""Muon for the matrices inside the blocks, AdamW for everything else, as one optimizer."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from ditune.errors import UserError


class MuonAdamW(Optimizer):
    """torch's Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) beside its AdamW.

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
        matrices = [(n, p) for n, p in named if _is_hidden_matrix(n, p)]
        others = [(n, p) for n, p in named if not _is_hidden_matrix(n, p)]
        if not matrices or not others:
            raise UserError(
                "Muon trains whole networks, and this method trains none of the matrices. Set optimizer=adamw."
            )
        self.parts = (
            Muon(matrices, muon_lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw"),
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
    return name.startswith("blocks.") and parameter.ndim == 2 and "adaLN" not in name

"""Routing: which expert computes which token, and the losses of load balance.

Suffixes of names are shapes: N images, T tokens of an image, M = N T tokens, k experts of a token, E experts,
S rows (a token once for each of its experts, sorted by expert), D hidden size.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

SCORES = ("softmax", "sigmoid")
CHOICES = ("token", "expert")


class Routing(NamedTuple):
    """Decisions of one layer's router, for losses (the first two carry gradients) and statistics."""

    logits_NTE: Tensor  # float32
    scores_NTE: Tensor  # float32, in [0, 1]
    chosen_NTE: Tensor  # bool


class Dispatch(NamedTuple):
    """Tokens as rows sorted by expert."""

    token_S: Tensor  # int64 in [0, M): token of the row
    weight_S: Tensor  # float32: weight of the row's output
    counts_E: Tensor  # int64: rows of each expert
    rows_Mk: Tensor | None  # int64 in [0, S): a token's rows; None if tokens have different numbers of rows


class Router(nn.Module):
    """Scores of experts by one linear layer, in float32 even under autocast: bf16 would change the chosen experts.

    Args:
        hidden_size: D.
        num_experts: E.
        top_k: k, experts of a token; with expert choice, their mean number.
        score: 'softmax' over the experts (DiT-MoE, arXiv 2407.11633), or 'sigmoid' (DeepSeek-V3, arXiv 2412.19437).
        renormalize: divide a token's k weights by their sum. As in the original, the weight of a single expert of
            several (k = 1 < E) stays its score: divided by itself it would always be 1, and only a balance loss would
            train the router. 'always': a single expert's weight is divided, too.
        scale: factor on all weights (2.0 in DSMoE, arXiv 2512.01252).
        choice: 'token': every token takes its k best experts, without capacity. 'expert': in every image each expert
            takes its T k / E best tokens (EC-DiT, arXiv 2410.02098), which is balanced by construction.

    The buffer `bias_E` is added to the scores for the choice only, not to the weights (arXiv 2408.15664). `Balance`
    updates it.

    Raises:
        ValueError: an unknown name, or a `top_k` outside of 1..E.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        score: str = "softmax",
        renormalize: bool | Literal["always"] = False,
        scale: float = 1.0,
        choice: str = "token",
    ):
        super().__init__()
        if score not in SCORES or choice not in CHOICES:
            raise ValueError(f"score must be one of {SCORES} and choice one of {CHOICES}, not {score!r} and {choice!r}")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts {num_experts}, but is {top_k}")
        if renormalize not in (True, False, "always"):
            raise ValueError(f"renormalize must be true, false or 'always', not {renormalize!r}")
        if choice == "expert" and renormalize:
            raise ValueError("with choice='expert' tokens have different numbers of experts: set renormalize=False")
        self.top_k, self.score, self.renormalize, self.scale, self.choice = top_k, score, renormalize, scale, choice
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("bias_E", torch.zeros(num_experts))

    def forward(self, x_NTD: Tensor) -> tuple[Dispatch, Routing]:
        """Choose the experts of all tokens x_NTD (N, T, D)."""
        with torch.autocast(x_NTD.device.type, enabled=False):
            logits_NTE = linear(x_NTD.float(), self.weight.float())
            scores_NTE = logits_NTE.softmax(dim=-1) if self.score == "softmax" else logits_NTE.sigmoid()
            dispatch, chosen_NTE = (self.by_token if self.choice == "token" else self.by_expert)(scores_NTE)
        return dispatch, Routing(logits_NTE, scores_NTE, chosen_NTE)

    def choose(self, scores_ME: Tensor) -> tuple[Tensor, Tensor]:
        """Experts of each token, best first, and their weights: (M, k) each."""
        experts_Mk = (scores_ME.detach() + self.bias_E).topk(self.top_k, dim=-1).indices
        weights_Mk = scores_ME.gather(-1, experts_Mk)
        one_of_several = self.top_k == 1 < scores_ME.shape[-1]
        if self.renormalize == "always" or (self.renormalize and not one_of_several):
            weights_Mk = weights_Mk / weights_Mk.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        return experts_Mk, weights_Mk * self.scale

    def by_token(self, scores_NTE: Tensor) -> tuple[Dispatch, Tensor]:
        """Token choice: the dispatch, and the chosen experts (N, T, E) bool."""
        experts_Mk, weights_Mk = self.choose(scores_NTE.flatten(0, 1))
        order_S = experts_Mk.flatten().argsort(stable=True)
        chosen_NTE = torch.zeros_like(scores_NTE, dtype=torch.bool).flatten(0, 1).scatter(1, experts_Mk, True)
        dispatch = Dispatch(
            token_S=order_S // self.top_k,
            weight_S=weights_Mk.flatten().index_select(0, order_S),
            counts_E=chosen_NTE.sum(dim=0),
            rows_Mk=order_S.argsort().view_as(experts_Mk),
        )
        return dispatch, chosen_NTE.view_as(scores_NTE)

    def by_expert(self, scores_NTE: Tensor) -> tuple[Dispatch, Tensor]:
        """Expert choice (EC-DiT, arXiv 2410.02098): the dispatch, and the chosen experts (N, T, E) bool."""
        N, T, E = scores_NTE.shape
        capacity = -(-T * self.top_k // E)  # C, tokens of each expert in each image, rounded up
        tokens_NCE = (scores_NTE.detach() + self.bias_E).topk(capacity, dim=1).indices
        weights_NCE = scores_NTE.gather(1, tokens_NCE) * self.scale
        first_N = T * torch.arange(N, device=scores_NTE.device)
        dispatch = Dispatch(
            token_S=(tokens_NCE + first_N[:, None, None]).permute(2, 0, 1).flatten(),
            weight_S=weights_NCE.permute(2, 0, 1).flatten(),
            counts_E=torch.full((E,), N * capacity, device=scores_NTE.device),
            rows_Mk=None,
        )
        return dispatch, torch.zeros_like(scores_NTE, dtype=torch.bool).scatter(1, tokens_NCE, True)


def balance_loss(routing: Routing, counts_E: Tensor | None = None, per_sequence: bool = False) -> Tensor:
    """sum_i f_i P_i of one layer (arXiv 2407.11633, eq. 5-7): 1 for an even load, at most E / k.

    f_i = E / (k T) times the tokens of expert i, without gradient. P_i is its mean score; sigmoid scores are divided by
    their sum first.

    Args:
        routing: of the layer.
        counts_E: tokens of each expert, for f; None = those of `routing` itself.
        per_sequence: compute f and P per image, and average the losses.

    Returns:
        Scalar.
    """
    scores_NTE = routing.scores_NTE / routing.scores_NTE.sum(dim=-1, keepdim=True)
    if per_sequence:
        load_NE, mean_NE = load(routing.chosen_NTE.sum(dim=1)), scores_NTE.mean(dim=1)
        return (load_NE * mean_NE).sum(dim=-1).mean()
    counts_E = routing.chosen_NTE.sum(dim=(0, 1)) if counts_E is None else counts_E
    return (load(counts_E) * scores_NTE.mean(dim=(0, 1))).sum()


def load(counts: Tensor) -> Tensor:  # (..., E) -> (..., E) float32
    """Load of each expert relative to an even load, which is 1, from counts of tokens."""
    return counts.float() * counts.shape[-1] / counts.sum(dim=-1, keepdim=True)


def z_loss(routing: Routing) -> Tensor:
    """Mean squared log-sum-exp of the logits, which keeps them small (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return routing.logits_NTE.logsumexp(dim=-1).square().mean()

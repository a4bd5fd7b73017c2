"""Routing: which expert computes which token, and the losses of load balance.

Suffixes of names are shapes: N images, T tokens of an image, M = N T tokens, k experts of a token, E experts,
S rows (a token once for each of its experts, sorted by expert), D hidden size.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

SCORES = ("softmax", "sigmoid")
CHOICES = ("token", "expert", "time")
ROUTE_ON = ("modulated", "unmodulated")


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
            takes its T k / E best tokens (EC-DiT, arXiv 2410.02098), which is balanced by construction. 'time': see
            `TimeRouter`.

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
        if choice == "time":
            raise ValueError("choice='time' has no scores: build a TimeRouter")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be between 1 and num_experts {num_experts}, but is {top_k}")
        if renormalize not in (True, False, "always"):
            raise ValueError(f"renormalize must be true, false or 'always', not {renormalize!r}")
        if choice == "expert" and renormalize:
            raise ValueError("with choice='expert' tokens have different numbers of experts: set renormalize=False")
        self.top_k, self.score, self.renormalize, self.scale, self.choice = top_k, score, renormalize, scale, choice
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.register_buffer("bias_E", torch.zeros(num_experts))

    def initialize_weights(self) -> None:
        """As the original."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x_NTD: Tensor) -> tuple[Dispatch, Routing]:
        """Choose the experts of all tokens by x_NTD (N, T, D), which are the tokens themselves or others of them."""
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
        return sorted_by_expert(*self.choose(scores_NTE.flatten(0, 1)), scores_NTE)

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


class TimeRouter(nn.Module):
    """Experts by the time of the image alone: an ablation of what a learned router finds.

    The network's time t in [0, R) is divided into E / k equal slices. Slice s belongs to the k experts s k to
    s k + k - 1, which have equal weights. So a token costs as much as with `Router`, and nothing is learned here. One
    expert for each slice (k = 1) is the choice of eDiff-I (arXiv 2211.01324), inside of one network.

    Args:
        num_experts: E.
        top_k: k, a divisor of E.
        scale: sum of a token's weights.
        time_range: R, at which the time ends that the process gives to the network.

    Raises:
        ValueError: `top_k` is no divisor of E, or `time_range` is not above 0.
    """

    weight = None  # there is nothing to learn

    def __init__(self, num_experts: int, top_k: int, scale: float = 1.0, time_range: float = 1000.0):
        super().__init__()
        if top_k < 1 or num_experts % top_k:
            raise ValueError(f"choice='time' needs a top_k that divides num_experts {num_experts}, not {top_k}")
        if not time_range > 0:
            raise ValueError(f"time_range must be above 0, but is {time_range}")
        self.num_experts, self.top_k, self.scale, self.time_range = num_experts, top_k, scale, time_range

    def initialize_weights(self) -> None:
        """There are none."""

    def forward(self, time_NT: Tensor) -> tuple[Dispatch, Routing]:
        """Choose the experts of all tokens by the time time_NT (N, T) of their image, which is the same for all T."""
        slices, like = self.num_experts // self.top_k, torch.arange(self.num_experts, device=time_NT.device)
        # multiplied first: t = 300 of 1000 is the beginning of the fourth of ten slices, whatever the rounding
        slice_M = (time_NT.flatten().float() * slices / self.time_range).floor().clamp(0, slices - 1).long()
        experts_Mk = slice_M[:, None] * self.top_k + like[: self.top_k]
        weights_Mk = torch.full_like(experts_Mk, self.scale / self.top_k, dtype=torch.float32)
        logits_NTE = torch.zeros(*time_NT.shape, self.num_experts, device=time_NT.device)  # no expert is preferred
        dispatch, chosen_NTE = sorted_by_expert(experts_Mk, weights_Mk, logits_NTE)
        return dispatch, Routing(logits_NTE, chosen_NTE / self.top_k, chosen_NTE)


def sorted_by_expert(experts_Mk: Tensor, weights_Mk: Tensor, like_NTE: Tensor) -> tuple[Dispatch, Tensor]:
    """The dispatch of tokens with k experts each.

    Args:
        experts_Mk: experts of each token.
        weights_Mk: weights of their outputs.
        like_NTE: of which the shape and device matter.

    Returns:
        The dispatch, and the chosen experts (N, T, E) bool.
    """
    order_S = experts_Mk.flatten().argsort(stable=True)
    chosen_NTE = torch.zeros_like(like_NTE, dtype=torch.bool).flatten(0, 1).scatter(1, experts_Mk, True)
    dispatch = Dispatch(
        token_S=order_S // experts_Mk.shape[1],
        weight_S=weights_Mk.flatten().index_select(0, order_S),
        counts_E=chosen_NTE.sum(dim=0),
        rows_Mk=order_S.argsort().view_as(experts_Mk),
    )
    return dispatch, chosen_NTE.view_as(like_NTE)


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

"""Mixture of experts: routed experts with stacked weights, and shared experts that compute every token.

Suffixes of names are shapes, see routing.py for N, T, M, k, E, S, D. F: width of an expert. R: rows of one expert.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from ditune.networks.block import apply_gamma
from ditune.networks.routing import Dispatch, Router, Routing, TimeRouter

Product = Callable[[Tensor, Tensor], Tensor]  # rows (R, D), weights (D, F) -> (R, F); or of all experts at once

FEW, LARGE = 128, 2**25  # rows of an expert, and bytes of the experts' matrices, see `back_end`


def swiglu_form(mm: Product, x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """SwiGLU (arXiv 2002.05202): (silu(x W_gate) * x W_up) W_down. `mm` multiplies rows by the weights of experts."""
    return mm(silu(mm(x, w_gate)) * mm(x, w_up), w_down)


def gelu_form(mm: Product, x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    """DiT's MLP with tanh-GELU. `mm` multiplies rows by the weights of experts."""
    return mm(gelu(mm(x, w_in) + b_in, approximate="tanh"), w_out) + b_out


# expert: (its form, its weights with their shapes). 'gelu' is DiT's own MLP, for upcycling a dense network.
FORMS: dict[str, tuple[Callable[..., Tensor], dict[str, str]]] = {
    "swiglu": (swiglu_form, {"w_gate_EDF": "EDF", "w_up_EDF": "EDF", "w_down_EFD": "EFD"}),
    "gelu": (gelu_form, {"w_in_EDF": "EDF", "bias_in_EF": "EF", "w_out_EFD": "EFD", "bias_out_ED": "ED"}),
}


@torch._disable_dynamo  # torch.compiler.disable, but the compiler is imported at the first call: it takes seconds
def by_slices(form: Callable[..., Tensor], x_SD: Tensor, counts_E: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Compute expert by expert, so that an expert's activations stay in the cache.

    An expert without tokens gets gradients of zero. The weights are unbound: `w[e]` would allocate a gradient of the
    full size for every expert.

    Args:
        form: see `FORMS`.
        x_SD: rows, sorted by expert.
        counts_E: number of rows of each expert.
        weights: of all experts, in the order of the form.

    Returns:
        Rows (S, D).
    """
    rows = zip(x_SD.split(numbers(counts_E, len(x_SD))), *(w.unbind() for w in weights), strict=True)
    return torch.cat([form(torch.matmul, x_RD, *(w.to(x_RD.dtype) for w in own)) for x_RD, *own in rows])


def numbers(counts_E: Tensor, rows: int) -> list[int]:
    """The counts of the experts; even ones, of `rows` in all, where tensors have no values, as in a plan."""
    if hasattr(counts_E, "fake_mode"):
        return [len(part) for part in torch.empty(rows).tensor_split(len(counts_E))]
    return counts_E.tolist()


def by_grouped_mm(form: Callable[..., Tensor], x_SD: Tensor, counts_E: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Compute all experts in one kernel, without waiting for the counts; arguments as in `by_slices`."""
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    weights = [w.to(x_SD.dtype) for w in weights]  # autocast does not know grouped_mm
    rows = [w if w.ndim == 3 else w.repeat_interleave(counts_E, dim=0, output_size=len(x_SD)) for w in weights]
    return form(lambda x, w: torch.nn.functional.grouped_mm(x, w, offs=ends_E), x_SD, *rows)


def back_end(x_SD: Tensor, weights: Sequence[Tensor]) -> Callable[..., Tensor]:
    """The faster of `by_slices` and `by_grouped_mm`, whose rows must be multiples of 16 bytes (docs/results/moe.md).

    In fp32 on a CPU slices are faster, unless many experts with few rows each train: autograd copies the gradients of
    the slices into one tensor, which then takes as long as a third of the products (docs/results/speed.md).
    """
    stacked = [w for w in weights if w.ndim == 3]
    if hasattr(x_SD, "fake_mode") or any(size * x_SD.element_size() % 16 for w in stacked for size in w.shape[1:]):
        return by_slices
    if x_SD.is_cuda:
        return by_grouped_mm if x_SD.dtype == torch.bfloat16 else by_slices
    copied = torch.is_grad_enabled() and any(w.requires_grad and w.nbytes > LARGE for w in stacked)
    few = len(x_SD) < FEW * len(stacked[0])
    return by_grouped_mm if copied and few and x_SD.dtype == torch.float32 else by_slices


class Experts(nn.Module):
    """E experts of one form and width, with stacked weights.

    Args:
        num_experts: E.
        hidden_size: D.
        width: F.
        form: one of `FORMS`.

    Raises:
        ValueError: an unknown form.
    """

    def __init__(self, num_experts: int, hidden_size: int, width: int, form: str = "swiglu"):
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"expert must be one of {', '.join(FORMS)}, not {form!r}")
        self.form, shapes = FORMS[form]
        self.names = list(shapes)
        sizes = {"E": num_experts, "D": hidden_size, "F": width}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty([sizes[letter] for letter in shape])))

    def initialize_weights(self) -> None:
        """Xavier-uniform matrices and zero biases, as DiT's linear layers."""
        for parameter in self.parameters():
            if parameter.ndim == 3:  # each expert like a linear layer
                for w in parameter.unbind():
                    nn.init.xavier_uniform_(w)
            else:
                nn.init.zeros_(parameter)

    def forward(self, x_SD: Tensor, counts_E: Tensor) -> Tensor:  # (S, D), (E,) -> (S, D)
        """Each row by its expert; rows are sorted by expert, `counts_E` of each."""
        device = x_SD.device.type
        if torch.is_autocast_enabled(device):
            x_SD = x_SD.to(torch.get_autocast_dtype(device))
        weights = [getattr(self, name) for name in self.names]
        return back_end(x_SD, weights)(self.form, x_SD, counts_E, weights)


class SwiGLU(nn.Module):
    """The shared experts. Ungated shared experts are equivalent to one wider SwiGLU, so they are stored as one.

    Args:
        hidden_size: D.
        width: of all shared experts together.
    """

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, T, D) -> (N, T, D)
        """Each token by itself."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class ToRows(torch.autograd.Function):
    """Tokens (M, D) to rows (S, D). `ToTokens` is its adjoint, so neither needs atomic additions."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, token_S: Tensor, rows_Mk: Tensor) -> Tensor:
        """The rows; see `to_rows`."""
        ctx.save_for_backward(token_S, rows_Mk)
        return x_MD.index_select(0, token_S)

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the tokens: the sum of their rows' gradients."""
        return ToTokens.apply(grad_SD, *ctx.saved_tensors), None, None


class ToTokens(torch.autograd.Function):
    """Rows (S, D) to tokens (M, D), the sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, token_S: Tensor, rows_Mk: Tensor) -> Tensor:
        """The tokens; see `to_tokens`."""
        ctx.save_for_backward(token_S, rows_Mk)
        return gathered(y_SD, rows_Mk)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the rows: the gradients of their tokens."""
        return ToRows.apply(grad_MD, *ctx.saved_tensors), None, None


def gathered(y_SD: Tensor, rows_Mk: Tensor) -> Tensor:  # (M, D)
    """Sum of each token's k rows."""
    return y_SD.index_select(0, rows_Mk.flatten()).unflatten(0, rows_Mk.shape).sum(dim=1)


def to_rows(x_MD: Tensor, dispatch: Dispatch) -> Tensor:  # (S, D)
    """Copy tokens to the rows of their experts (dispatch)."""
    if dispatch.rows_Mk is None or not torch.is_grad_enabled():  # forward mode knows plain operations only
        return x_MD.index_select(0, dispatch.token_S)
    return ToRows.apply(x_MD, dispatch.token_S, dispatch.rows_Mk)


def to_tokens(y_SD: Tensor, dispatch: Dispatch, tokens: int) -> Tensor:  # (M, D)
    """Sum the rows of every token (combine); `tokens` is M."""
    if dispatch.rows_Mk is None:
        return y_SD.new_zeros(tokens, y_SD.shape[1]).index_add(0, dispatch.token_S, y_SD)
    if not torch.is_grad_enabled():
        return gathered(y_SD, dispatch.rows_Mk)
    return ToTokens.apply(y_SD, dispatch.token_S, dispatch.rows_Mk)


class MoE(nn.Module):
    """Routed experts, weighted by their scores, plus the shared experts.

    Args:
        hidden_size: D.
        num_experts: E, number of routed experts.
        expert_size: F, width of a routed expert.
        shared_size: width of all shared SwiGLU experts together; 0 = none.
        expert: form of the routed experts, 'swiglu' or 'gelu'.
        choice: see `Router`; 'time' builds a `TimeRouter`.
        time_range: see `TimeRouter`.
        **routing: arguments of `Router`, of which `TimeRouter` knows top_k and scale only.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        expert_size: int,
        shared_size: int,
        expert: str = "swiglu",
        choice: str = "token",
        time_range: float = 1000.0,
        **routing: Any,
    ):
        super().__init__()
        self.hidden_size, self.num_experts = hidden_size, num_experts
        if choice == "time":
            self.router = TimeRouter(num_experts, routing["top_k"], routing.get("scale", 1.0), time_range)
        else:
            self.router = Router(hidden_size, num_experts, choice=choice, **routing)
        self.experts = Experts(num_experts, hidden_size, expert_size, expert)
        self.shared_experts = SwiGLU(hidden_size, shared_size) if shared_size else None
        self.register_parameter("gamma_routed", None)  # (D,), scales the routed sum: added by DiffFit
        self.register_parameter("gamma_shared", None)  # (D,), scales the shared output: added by DiffFit

    def initialize_weights(self) -> None:
        """Router and routed experts; the shared experts are linear layers of the network."""
        self.router.initialize_weights()
        self.experts.initialize_weights()

    def forward(self, x_NTD: Tensor, by: Tensor | None = None) -> tuple[Tensor, Routing]:  # (N, T, D)
        """Tokens (N, T, D) to tokens (N, T, D), and the routing.

        Args:
            x_NTD: the tokens.
            by: what the router decides by, instead of the tokens: others of the same shape, or their times (N, T).
        """
        dispatch, routing = self.router(x_NTD if by is None else by)
        x_MD = x_NTD.flatten(0, 1)
        y_SD = self.experts(to_rows(x_MD, dispatch), dispatch.counts_E)
        y_SD = y_SD * dispatch.weight_S.to(y_SD.dtype)[:, None]
        y_NTD = apply_gamma(to_tokens(y_SD, dispatch, len(x_MD)).view(x_NTD.shape), self.gamma_routed)
        if self.shared_experts is not None:
            y_NTD = y_NTD + apply_gamma(self.shared_experts(x_NTD), self.gamma_shared)
        return y_NTD, routing

"""Seconds of one mixture-of-experts layer, forward and backward, as ratios to the original's layer in the same run.

    python benchmarks/moe_layer.py [--tokens 4096] [--rounds 7] [--threads 1] [--device cuda]

The original's layer is written here after its description (feizc/DiT-MoE, arXiv 2407.11633): every token repeated k
times, a mask for each expert, results put into place by mask, matrices in two slices. `dense` is one SwiGLU as wide as
what a token activates, gate and up in one matrix. Speed-ups are against the original's layer in fp32.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from measuring import Step, Variant, deliver, measured, parser
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from ditune.networks import moe
from ditune.networks.moe import MoE, SwiGLU, by_grouped_mm, by_slices
from ditune.networks.routing import balance_loss

D, E, K, F, SHARED = 384, 8, 2, 1536, 768  # DiT-MoE-S/2-8E2A
COLUMNS = {
    "name": ("", "text"),
    "ms": ("ms", "ms"),
    "of_original": ("of the original", "float"),
    "of_dense": ("of dense", "float"),
    "ratio": ("speed-up", "x"),
    "least": ("least", "x"),
    "most": ("most", "x"),
    "peak_mib": ("peak MiB", "int"),
}


class SlicedSwiGLU(SwiGLU):
    """The same product in two slices, as the original's default (pretraining_tp=2)."""

    def forward(self, x: Tensor) -> Tensor:
        half = self.gate_proj.weight.shape[0] // 2
        gate, up = (
            torch.cat([linear(x, w) for w in layer.weight.split(half)], dim=-1)
            for layer in (self.gate_proj, self.up_proj)
        )
        hidden = (silu(gate) * up).split(half, dim=-1)
        return sum(linear(h, w) for h, w in zip(hidden, self.down_proj.weight.split(half, dim=1), strict=True))


class OriginalLayer(nn.Module):
    """Masks instead of sorting."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(E, D))
        nn.init.kaiming_uniform_(self.gate, a=5**0.5)
        self.experts = nn.ModuleList(SlicedSwiGLU(D, F) for _ in range(E))
        self.shared = SlicedSwiGLU(D, SHARED)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(0, 1)
        scores = linear(tokens, self.gate).softmax(dim=-1)
        weight, index = scores.topk(K, dim=-1, sorted=False)
        load = nn.functional.one_hot(index.flatten(), E).float().mean(dim=0) * E
        aux = (load * scores.mean(dim=0)).sum()
        rows, flat = tokens.repeat_interleave(K, dim=0), index.flatten()
        out = torch.empty_like(rows)
        for e, expert in enumerate(self.experts):
            out[flat == e] = expert(rows[flat == e]).to(out.dtype)
        routed = (out.view(*weight.shape, -1) * weight.unsqueeze(-1)).sum(dim=1)
        return routed.view_as(x) + self.shared(x), aux


class DenseSwiGLU(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.gate_up, self.down = nn.Linear(D, 2 * width, bias=False), nn.Linear(width, D, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(silu(gate) * up), x.new_zeros(())


def step_function(
    layer: nn.Module, tokens: int, bf16: bool, device: str, back_end: Callable | None = None
) -> Callable[[], None]:
    layer = layer.to(device)
    x = torch.randn(tokens // 256, 256, D, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(device)

    def step() -> None:
        moe.back_end = lambda *_: back_end
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            y, decided = layer(x)
        aux = balance_loss(decided) if isinstance(layer, MoE) else decided
        ((y * grad).sum() + 0.01 * aux).backward()
        x.grad = None
        layer.zero_grad()

    return step


def ours() -> MoE:
    layer = MoE(D, E, expert_size=F, shared_size=SHARED, top_k=K)
    layer.initialize_weights()
    return layer


def variants(given: argparse.Namespace) -> list[Variant]:
    """Rows of both tables."""
    place = {"tokens": given.tokens, "device": given.device}
    made = []
    for dtype in ("fp32", "bf16"):
        bf16 = dtype == "bf16"
        layers = {
            "original's layer": (OriginalLayer, None),
            "ours, slices": (ours, by_slices),
            "ours, grouped_mm": (ours, by_grouped_mm),
            "dense of the same work": (partial(DenseSwiGLU, K * F + SHARED), None),
        }
        for name, (layer, end) in layers.items():

            def build(layer: Callable[[], nn.Module] = layer, end: Callable | None = end, bf16: bool = bf16) -> Step:
                return step_function(layer(), bf16=bf16, back_end=end, **place)

            made.append(Variant(f"{name}, {dtype}", build, dtype=dtype))
    return made


def main(arguments: Sequence[str] | None = None) -> dict:
    """Measure, print, and write; returns the result."""
    options = parser(__doc__, seconds=60, rounds=7)
    options.add_argument("--tokens", type=int, default=4096)
    options.add_argument("--threads", type=int, default=1)
    given = options.parse_args(arguments)
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    chosen = moe.back_end
    try:
        rows = measured(variants(given), given, "original's layer, fp32", memory=True)
    finally:
        moe.back_end = chosen
    times = {row["name"]: row.get("ms") for row in rows}
    for row in rows:
        if "ms" in row:
            row["of_original"] = row["ms"] / times[f"original's layer, {row['dtype']}"]
            row["of_dense"] = row["ms"] / times[f"dense of the same work, {row['dtype']}"]
    return deliver("moe_layer", given, COLUMNS, rows)


if __name__ == "__main__":
    main()

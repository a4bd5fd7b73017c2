"""Seconds of one mixture-of-experts layer, forward and backward, as ratios to the original's layer in the same run.

    python benchmarks/moe_layer.py [--tokens 4096] [--rounds 7] [--threads 1] [--device cuda]

The original's layer is written here after its description (feizc/DiT-MoE, arXiv 2407.11633): every token repeated k
times, a mask for each expert, results put into place by mask, matrices in two slices. `dense` is one SwiGLU as wide as
what a token activates, gate and up in one matrix. On CPUs processor time, which other work on a machine hardly changes
(with one thread), on GPUs time; variants are timed in turn, in rounds, and medians are shown.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from ditune.networks import moe
from ditune.networks.moe import MoE, SwiGLU, by_grouped_mm, by_slices
from ditune.networks.routing import balance_loss

D, E, K, F, SHARED = 384, 8, 2, 1536, 768  # DiT-MoE-S/2-8E2A
GPU_STEPS = 10  # that are timed together, so that launches overlap as in a training


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


def timed(step: Callable[[], None], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(GPU_STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / GPU_STEPS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    build = partial(step_function, tokens=arguments.tokens, device=arguments.device)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    width = K * F + SHARED
    for bf16 in (True, False):
        variants = {
            "original's layer": build(OriginalLayer(), bf16=bf16),
            "ours, slices": build(ours(), bf16=bf16, back_end=by_slices),
            "ours, grouped_mm": build(ours(), bf16=bf16, back_end=by_grouped_mm),
            "dense of the same work": build(DenseSwiGLU(width), bf16=bf16),
        }
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for round_ in range(arguments.rounds + 1):
            for name, step in variants.items():
                taken = timed(step, arguments.device)
                if round_:  # the first one allocates
                    seconds[name].append(taken)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        original, dense = medians["original's layer"], medians["dense of the same work"]
        where = f"{arguments.threads} thread(s)" if arguments.device == "cpu" else torch.cuda.get_device_name()
        sys.stdout.write(f"{arguments.tokens} tokens, {'bf16' if bf16 else 'fp32'}, {where}\n")
        for name, s in medians.items():
            sys.stdout.write(
                f"  {name:24} {s * 1e3:9.2f} ms   {s / original:.2f} of original   {s / dense:.2f} of dense\n"
            )
        sys.stdout.write(json.dumps({"torch": torch.__version__, **medians}) + "\n")


if __name__ == "__main__":
    main()

"""Where the time of a training step goes: operators of one thread, by kind, for full fine-tuning and DiffFit.

    python benchmarks/step_profile.py [--network dit_s_2] [--batch 8] [--method difffit] [--rounds 3]

By torch's profiler, an operator's own time without what it calls; of several steps the fastest. Shares are those of a
step's whole. `--trace <folder>` also writes the trace, for chrome://tracing or Perfetto.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from measuring import Step, deliver, missing, parser, traced
from torch.profiler import ProfilerActivity, profile
from train_step import our_step

KINDS = {  # kind -> names of its operators, which may go on after a "_"
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "mkldnn_convolution"),
    "attention": ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "_softmax"),
    "GELU": ("gelu",),
    "LayerNorm": ("native_layer_norm",),
    "optimizer and EMA": ("_fused_adamw", "_foreach", "Optimizer.step#AdamW.step"),
    "sums": ("sum", "mean", "linalg_vector_norm"),
    "copies": ("copy", "cat", "stack", "clone", "index", "gather", "fill", "zero", "embedding_dense"),
    "products and sums of elements": ("mul", "add", "sub", "rsub", "div", "neg", "where"),
    "other functions of elements": ("silu", "sigmoid", "exp", "pow", "cos", "sin", "tanh"),
}
REST = "the rest: small operators, autograd, Python"
ROWS = 10  # operators that have a row of their own
COLUMNS = {
    "name": ("", "text"),
    "calls": ("calls", "int"),
    "ms": ("ms", "ms"),
    "share": ("share", "share"),
    "full_calls": ("full: calls", "int"),
    "full_ms": ("full: ms", "ms"),
    "full_share": ("full: share", "share"),
}


def kind_of(operator: str) -> str:
    """The kind of an operator such as `aten::addmm`."""
    name = operator.removeprefix("aten::")
    return next((kind for kind, names in KINDS.items() for n in names if name == n or name.startswith(f"{n}_")), REST)


def times_of(step: Step, device: str, rounds: int) -> dict[str, tuple[int, float]]:
    """Operator -> calls and ms of its own in the fastest of several steps, after one that is not counted."""
    step()
    kinds, found = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda"), []
    for _ in range(rounds):
        with profile(activities=kinds) as recorded:
            step()
            if device == "cuda":
                torch.cuda.synchronize()
        key = f"self_{device if device == 'cpu' else 'device'}_time_total"
        found.append({e.key: (e.count, getattr(e, key) / 1e3) for e in recorded.key_averages()})
    return min(found, key=total)


def total(times: dict[str, tuple[int, float]]) -> float:
    """ms of all operators."""
    return sum(ms for _, ms in times.values())


def summed(times: dict[str, tuple[int, float]], names: Iterable[str]) -> tuple[int, float]:
    """Calls and ms of some of the operators."""
    own = [times[name] for name in names if name in times]
    return sum(calls for calls, _ in own), sum(ms for _, ms in own)


def rows_of(times: dict[str, tuple[int, float]], full: dict[str, tuple[int, float]]) -> list[dict[str, Any]]:
    """The whole step, its kinds, and the dearest operators; of the method, and of full fine-tuning."""
    by_kind: dict[str, set[str]] = defaultdict(set)
    for operator in times.keys() | full.keys():
        by_kind[kind_of(operator)].add(operator)
    groups = {"the whole step": times.keys() | full.keys()}
    groups |= {kind: by_kind[kind] for kind in (*KINDS, REST)}
    dearest = sorted(times, key=lambda operator: -times[operator][1])[:ROWS]
    groups |= {f"`{operator}`": {operator} for operator in dearest}
    rows = []
    for name, operators in groups.items():
        row: dict[str, Any] = {"name": name}
        for prefix, of in (("", times), ("full_", full)):
            calls, ms = summed(of, operators)
            row |= {f"{prefix}calls": calls, f"{prefix}ms": ms, f"{prefix}share": ms / total(of)}
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> dict:
    """Profile, print, and write; returns the result."""
    options = parser(__doc__, seconds=60, rounds=3)
    options.add_argument("--network", default="dit_s_2")
    options.add_argument("--batch", type=int, default=8)
    options.add_argument("--pixels", type=int, default=256)
    options.add_argument("--method", default="difffit", help="a file of configs/peft")
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    if missing(given.device):
        rows = [{"name": name, "not run": missing(given.device)} for name in ("the whole step", *KINDS, REST)]
        return deliver("step_profile", given, COLUMNS, rows)
    found = {}
    for method in ("full", given.method):
        step = our_step(given.network, given.batch, given.pixels, given.device, method)
        found[method] = times_of(step, given.device, given.rounds)
        if given.trace is not None:
            traced(step, given.device, given.trace / f"{method}.json")
    return deliver("step_profile", given, COLUMNS, rows_of(found[given.method], found["full"]))


if __name__ == "__main__":
    main()

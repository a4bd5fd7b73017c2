"""Time of guided sampling, as ratios to sampling as the original does it, in the same run.

    python benchmarks/sampling.py [--device cuda] [--network dit_xl_2] [--n 2] [--steps 2] [--out docs/results/speed]

A call generates latents in a few steps; the cost of a step does not depend on their number. The reference is in
reference.py. GFLOP/s count the network's blocks, twice for each image where guidance is on.
"""

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from measuring import Step, Variant, deliver, measured, parser
from reference import ReferenceDiT, reference_sampling
from torch import Tensor
from train_step import CLASSES, forward_flops, made_batch, moved_network

from ditune.networks import build_network
from ditune.processes import GaussianProcess
from ditune.samplers import DDIM, DDPM, Sampler, sample

DEFAULTS = {"cpu": ("dit_s_2", 2, 2), "cuda": ("dit_xl_2", 32, 10)}  # network, images, steps
GUIDANCE = 4.0
REFERENCE = "reference: DDPM, fp32"
COLUMNS = {
    "name": ("", "text"),
    "ms_a_step": ("ms a step", "ms"),
    "ratio": ("speed-up", "x"),
    "least": ("least", "x"),
    "most": ("most", "x"),
    "gflops_per_s": ("GFLOP/s", "int"),
    "peak_mib": ("peak MiB", "int"),
}


def original(given: argparse.Namespace, bf16: bool = False, tf32: bool = False) -> Step:
    """Sampling as the original does it."""
    ours = moved_network(given.network, given.pixels, given.device)
    network = ReferenceDiT(ours.config).to(given.device).eval()
    network.load_state_dict(ours.state_dict())
    noise, y = made_batch(given.n, given.pixels, given.device)

    def step() -> Tensor:
        before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, tf32
        with torch.autocast(given.device, torch.bfloat16, enabled=bf16):
            found = reference_sampling(network, noise, y, given.steps, GUIDANCE, lambda: torch.randn_like(noise))
        torch.backends.cuda.matmul.allow_tf32 = before
        return found

    return step


def product(
    given: argparse.Namespace,
    sampler: Sampler,
    guidance: float = GUIDANCE,
    bf16: bool = False,
) -> Step:
    """Sampling by `ditune.samplers.sample`; on a GPU with compiled blocks."""
    network = moved_network(given.network, given.pixels, given.device).eval()
    if given.device == "cuda":
        network.compile_blocks()
    noise, y = made_batch(given.n, given.pixels, given.device)

    def step() -> Tensor:
        with torch.autocast(given.device, torch.bfloat16, enabled=bf16):
            return sample(
                network,
                GaussianProcess(),
                noise,
                y,
                sampler=sampler,
                steps=given.steps,
                guidance=guidance,
                guidance_channels=3,
            )

    return step


def main(arguments: Sequence[str] | None = None) -> dict:
    """Measure, print, and write; returns the result."""
    options = parser(__doc__, seconds=60, rounds=7)
    options.add_argument("--network", help="default: dit_s_2 on a CPU, dit_xl_2 on a GPU")
    options.add_argument("--n", type=int, help="images; default: 2 on a CPU, 32 on a GPU")
    options.add_argument("--steps", type=int, help="default: 2 on a CPU, 10 on a GPU")
    options.add_argument("--pixels", type=int, default=256, help="side of the images; latents have an eighth of it")
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    network, n, steps = DEFAULTS[given.device]
    given.network, given.n, given.steps = given.network or network, given.n or n, given.steps or steps
    with torch.device("meta"):
        config = build_network(given.network, input_size=given.pixels // 8, num_classes=CLASSES).config
    once = given.n * given.steps * sum(forward_flops(config))
    variants = [Variant(REFERENCE, partial(original, given), given.n, 2 * once)]
    for name in ("tf32", "bf16"):
        build = partial(original, given, **{name: True})
        variants.append(Variant(f"the same, {name}", build, given.n, 2 * once, name))
    for dtype in ("fp32", "bf16"):
        ours = partial(product, given, bf16=dtype == "bf16")
        variants += [
            Variant(f"DDPM, {dtype}", partial(ours, DDPM()), given.n, 2 * once, dtype),
            Variant(f"DDIM, {dtype}", partial(ours, DDIM()), given.n, 2 * once, dtype),
            Variant(f"DDIM without guidance, {dtype}", partial(ours, DDIM(), 1.0), given.n, once, dtype),
        ]
    if given.device == "cpu":
        variants = [variant for variant in variants if variant.dtype != "tf32"]
    rows = measured(variants, given, REFERENCE, memory=True)
    for row in rows:
        if "ms" in row:
            row["ms_a_step"] = row["ms"] / given.steps
    return deliver("sampling", given, COLUMNS, rows)


if __name__ == "__main__":
    main()

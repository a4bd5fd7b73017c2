"""Distance to plain images and cost of each cache, beside plain sampling with as many full calls.

    python benchmarks/caching.py [--n 32] [--steps 50] [--guidance 5] [--device cuda] [--out docs/results/speed]

The network is the shipped base of the emoji. Every row makes the same images (noise and classes) and is compared with
plain sampling in `--steps` steps. Batches are made by all rows in turn; a speed-up is the median over the batches.
Plain rows with fewer steps show what as many network calls give without a cache.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from measuring import deliver, missing, parser, timed
from torch import Tensor, nn

from ditune.autoencoders import KL
from ditune.checkpoints import read_network
from ditune.generation.generator import ImageGenerator
from ditune.processes import build_process
from ditune.samplers import DDIM, Cache, Delta, Fora, Taylor

ASSETS = Path(__file__).resolve().parents[1] / "assets"
POLICIES: dict[str, Cache] = {
    "fora, interval 2": Fora(2),
    "fora, interval 3": Fora(3),
    "fora, interval 4": Fora(4),
    "taylor, interval 2, order 1": Taylor(2, 1, "taylor"),
    "taylor, interval 4, order 1": Taylor(4, 1, "taylor"),
    "taylor, interval 4, order 2": Taylor(4, 2, "taylor"),
    "newton, interval 4, order 2": Taylor(4, 2, "newton"),
    "newton, interval 4, order 4": Taylor(4, 4, "newton"),
    "delta, interval 2": Delta(2),
    "delta, interval 4": Delta(4),
}
COLUMNS = {
    "name": ("", "text"),
    "calls": ("full calls", "int"),
    "ratio": ("speed-up", "x"),
    "rms": ("distance, of 255", "float"),
    "worst": ("of the farthest image", "float"),
}


def rows_of(steps: int) -> dict[str, tuple[int, Cache | None, int]]:
    """Name -> (steps, cache, full calls) of every row; the first one is what the others are compared with."""
    calls = {name: sum(cache.is_full(k, steps) for k in range(steps)) for name, cache in POLICIES.items()}
    made: dict[str, tuple[int, Cache | None, int]] = {f"plain, {steps} steps": (steps, None, steps)}
    made |= {name: (steps, cache, calls[name]) for name, cache in POLICIES.items()}
    fewer = [count for count in sorted(set(calls.values()), reverse=True) if 2 <= count < steps]
    return made | {f"plain, {count} steps": (count, None, count) for count in fewer}


def generate(
    generator: ImageGenerator, network: nn.Module, labels: Tensor, numbers: list[int], images: dict, name: str
) -> None:
    """Put the images with these numbers into `images`."""
    images[name] = generator.generate(network, labels, 0, numbers).double()


def compared(given: argparse.Namespace, jobs: dict[str, tuple[int, Cache | None, int]]) -> list[dict]:
    """Make the images of all rows, batch by batch, and compare them with those of the first row."""
    read = read_network(ASSETS / "emoji" / "base.safetensors")
    network = read.network.to(given.device).eval()
    autoencoder = KL("kl_emoji", ASSETS / "autoencoders" / "kl_emoji").to(given.device).eval()
    base = ImageGenerator(
        build_process(read.process), autoencoder, 64, DDIM(), given.steps, given.guidance, batch_size=16, bf16=False
    )
    plain = next(iter(jobs))
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    squares: dict[str, list[float]] = {name: [] for name in jobs}  # mean square difference of every image
    start = time.monotonic()
    for first in range(0, given.n, base.batch_size):
        numbers = list(range(first, min(first + base.batch_size, given.n)))
        labels, images = torch.tensor(numbers) % network.num_classes, {}
        for name, (steps, cache, _) in jobs.items():
            generator = ImageGenerator(**(vars(base) | {"steps": steps, "cache": cache}))
            if not seconds[name]:  # kernels are chosen
                ImageGenerator(**(vars(base) | {"steps": 2})).generate(network, labels, 0, numbers)
            step = partial(generate, generator, network, labels, numbers, images, name)
            seconds[name].append(timed(step, given.device))
            squares[name] += (images[name] - images[plain]).square().mean(dim=(1, 2, 3)).tolist()
            sys.stderr.write(f"images {first}-{numbers[-1]}, {name}, {time.monotonic() - start:.0f} s\n")
    rows = []
    for name, (_, _, calls) in jobs.items():
        ratios = [there / here for there, here in zip(seconds[plain], seconds[name], strict=True)]
        row = {"name": name, "calls": calls, "seconds": sum(seconds[name]), "ratio": statistics.median(ratios)}
        row |= {"least": min(ratios), "most": max(ratios)}
        rows.append(row | {"rms": statistics.mean(squares[name]) ** 0.5, "worst": max(squares[name]) ** 0.5})
    return rows


def main(arguments: Sequence[str] | None = None) -> dict:
    """Compare, print, and write; returns the result."""
    options = parser(__doc__, seconds=0, rounds=0)
    options.add_argument("--n", type=int, default=32, help="images")
    options.add_argument("--steps", type=int, default=50, help="steps of the plain images")
    options.add_argument("--guidance", type=float, default=5.0, help="scale of classifier-free guidance")
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    jobs = rows_of(given.steps)
    reason = missing(given.device)
    rows = [{"name": name, "not run": reason} for name in jobs] if reason else compared(given, jobs)
    return deliver("caching", given, COLUMNS, rows)


if __name__ == "__main__":
    main()

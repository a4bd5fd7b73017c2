"""Distance to plain images and time of each cache, beside plain sampling with as many full calls.

    python benchmarks/caching.py [--n 32] [--steps 50] [--guidance 5] [--device cuda] [--out caching.json]

The network is the shipped base of the emoji. Every row makes the same images (noise and classes), one batch at a time,
and is compared with plain sampling in `--steps` steps. Plain rows with fewer steps show what the same number of
network calls gives without a cache.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from ditune.autoencoders import KL
from ditune.checkpoints import read_network
from ditune.distributed import best_device
from ditune.generation.generator import ImageGenerator
from ditune.processes import build_process
from ditune.progress import meter
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


def images(network: nn.Module, base: ImageGenerator, n: int, steps: int, cache: Cache | None) -> tuple[Tensor, float]:
    """Images (N, 3, R, R) in 0..255 as floats, and the seconds they took."""
    generator = ImageGenerator(**(vars(base) | {"steps": steps, "cache": cache}))
    labels = torch.arange(n) % network.num_classes
    start = time.perf_counter()
    with meter(f"{steps} steps, {'plain' if cache is None else cache.kind}", n) as progress:
        found = generator.generate(network, labels, 0, on_batch=progress.update)
    return found.float(), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=32, help="images")
    parser.add_argument("--steps", type=int, default=50, help="steps of the plain images")
    parser.add_argument("--guidance", type=float, default=5.0, help="scale of classifier-free guidance")
    parser.add_argument("--device", default=str(best_device()))
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    given = parser.parse_args()

    read = read_network(ASSETS / "emoji" / "base.safetensors")
    network = read.network.to(given.device).eval()
    autoencoder = KL("kl_emoji", ASSETS / "autoencoders" / "kl_emoji").to(given.device).eval()
    process = build_process(read.process)
    base = ImageGenerator(process, autoencoder, 64, DDIM(), given.steps, given.guidance, batch_size=16, bf16=False)

    full_calls = {
        name: sum(map(cache.is_full, range(given.steps), [given.steps] * given.steps))
        for name, cache in POLICIES.items()
    }
    images(network, base, 16, 2, None)  # the first calls choose kernels
    plain, seconds = images(network, base, given.n, given.steps, None)
    rows = {"plain": {"full calls": given.steps, "seconds": seconds, "distance": 0.0}}
    jobs = [(name, given.steps, cache, full_calls[name]) for name, cache in POLICIES.items()]
    jobs += [("plain", count, None, count) for count in sorted(set(full_calls.values()), reverse=True)]
    for name, steps, cache, calls in jobs:
        found, took = images(network, base, given.n, steps, cache)
        distance = (found - plain).square().mean().sqrt().item()
        key = f"plain, {steps} steps" if cache is None else name
        rows[key] = {"full calls": calls, "seconds": took, "distance": distance}
    lines = [f"{'':<28} {'full calls':>10} {'speed-up':>9} {'distance':>9}   (root mean square, of 255)"]
    for name, row in rows.items():
        lines.append(f"{name:<28} {row['full calls']:>10} {seconds / row['seconds']:>8.2f}x {row['distance']:>9.2f}")
    sys.stdout.write("\n".join(lines) + "\n")
    if given.out is not None:
        given.out.write_text(json.dumps({"settings": vars(given) | {"out": None}, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

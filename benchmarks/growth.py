"""How the cost of a training step grows: tokens, depth, width, batch, experts, and processes.

    python benchmarks/growth.py [--device cuda] [--out docs/results/speed]

DiffFit in fp32 on a small network; each row is a ratio to the first row of its axis, per image, beside what the FLOPs
of the products say. Experts are one layer at equal work (two of E for each token, 2,048 tokens). With two processes
(gloo) the bytes that they exchange in a step are counted; their time says nothing on a machine with few cores.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from measuring import Step, Variant, deliver, measured, parser
from torch.nn.parallel import DistributedDataParallel
from train_step import PEFT, made_batch

from ditune.commands.parameters import build_method
from ditune.networks import DiT
from ditune.networks.moe import MoE
from ditune.objectives import GaussianDiffusion
from ditune.processes import GaussianProcess
from ditune.rng import StepRandom

COLUMNS = {
    "name": ("", "text"),
    "ms_each": ("ms an image", "ms"),
    "growth": ("cost", "x"),
    "least_growth": ("least", "x"),
    "most_growth": ("most", "x"),
    "theory": ("by FLOPs", "x"),
    "bytes": ("bytes exchanged", "int"),
    "trained_bytes": ("bytes of what trains", "int"),
}
SIZES = {"hidden_size": 192, "depth": 2, "num_heads": 3, "num_classes": 10}


def network_of(tokens: int = 64, batch: int = 2, **changes: int) -> tuple[DiT, int]:
    """A small network for so many tokens."""
    size = SIZES | changes
    size["num_heads"] = size["hidden_size"] // 64
    return DiT(input_size=2 * int(tokens**0.5), **size), batch


def small_step(device: str, tokens: int = 64, batch: int = 2, **changes: int) -> Step:
    """Loss and backward pass of DiffFit."""
    network, batch = network_of(tokens, batch, **changes)
    build_method("difffit", PEFT).apply(network)
    network.to(device)
    data = made_batch(batch, 8 * network.config["input_size"], device)
    data, random = (data[0], data[1] % SIZES["num_classes"]), StepRandom(0, 0, range(batch), device)
    objective = GaussianDiffusion(GaussianProcess())

    def step() -> None:
        objective.loss(network, data, random).total.backward()
        network.zero_grad()

    return step


def work(tokens: int = 64, batch: int = 2, hidden_size: int = 192, depth: int = 2) -> float:
    """FLOPs of an image in a step of DiffFit, in relative units."""
    return depth * (2 * 24 * tokens * hidden_size**2 + 3 * 4 * tokens**2 * hidden_size)


def experts_step(device: str, experts: int, tokens: int = 2048, size: int = 192, width: int = 768) -> Step:
    """Forward and backward pass of a layer of experts."""
    layer = MoE(size, experts, expert_size=width, shared_size=width // 2, top_k=2)
    layer.initialize_weights()
    layer.to(device)
    x = torch.randn(tokens // 64, 64, size, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()

    def step() -> None:
        layer(x)[0].square().sum().backward()
        layer.zero_grad()

    return step


AXES: dict[str, list[dict[str, int]]] = {
    "tokens": [{"tokens": 256, "batch": 1}, {"tokens": 1024, "batch": 1}, {"tokens": 4096, "batch": 1}],
    "depth": [{"depth": 2}, {"depth": 4}, {"depth": 8}],
    "width": [{"hidden_size": 192}, {"hidden_size": 384}, {"hidden_size": 768}],
    "batch": [{"batch": 1}, {"batch": 4}, {"batch": 16}],
}
EXPERTS = (4, 8, 16, 64)


def variants(given: argparse.Namespace) -> tuple[list[Variant], dict[str, tuple[str, float, int]]]:
    """Rows, and of each its axis's first row, its growth by theory, and its images."""
    made, facts = [], {}
    for axis, settings in AXES.items():
        first = None
        for setting in settings[: given.longest]:
            key = {"tokens": "tokens", "depth": "depth", "width": "hidden_size", "batch": "batch"}[axis]
            name = f"{axis} {setting[key]:,}"
            first = first or (name, work(**setting))
            made.append(Variant(name, partial(small_step, given.device, **setting)))
            facts[name] = first[0], work(**setting) / first[1], setting.get("batch", 2)
    for count in EXPERTS[: given.longest + 1]:
        name = f"experts {count}"
        made.append(Variant(name, partial(experts_step, given.device, count)))
        facts[name] = f"experts {EXPERTS[0]}", 1.0, 1
    return made, facts


def rank(number: int, world: int, port: int, found: Path) -> None:
    """One process of a step by DDP; the first one notes the bytes of its gradients and of what trains."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=number, world_size=world)
    torch.set_num_threads(1)
    network, batch = network_of()
    method = build_method("difffit", PEFT)
    method.apply(network)
    exchanged = []

    def count(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        exchanged.append(bucket.buffer().nbytes)
        return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])

    shared = DistributedDataParallel(network)
    shared.register_comm_hook(None, count)
    x, y = made_batch(batch, 8 * network.config["input_size"], "cpu")
    shared(x, torch.zeros(batch), y).square().sum().backward()
    trained = sum(p.nbytes for p in method.trainable(network).values())
    if number == 0:
        found.write_text(json.dumps([sum(exchanged), trained]))
    dist.destroy_process_group()


def exchanged_bytes(world: int) -> tuple[int, int]:
    """Bytes that a process gives to the others in a step, and those of what trains."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "bytes.json"
        torch.multiprocessing.spawn(rank, (world, 20000 + os.getpid() % 20000, found), nprocs=world)
        return tuple(json.loads(found.read_text()))


def main(arguments: Sequence[str] | None = None) -> dict:
    """Measure, print, and write; returns the result."""
    options = parser(__doc__, seconds=60, rounds=5)
    options.add_argument("--longest", type=int, default=3, help="points of each axis, from 1")
    options.add_argument("--processes", type=int, default=2, help="of the last row; 1 = leave it out")
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    made, facts = variants(given)
    rows = measured(made, given, made[0].name)
    times = {row["name"]: row for row in rows}
    for row in rows:
        if "ms" not in row:
            continue
        first, theory, images = facts[row["name"]]
        start, start_images = times[first], facts[first][2]
        row["ms_each"], row["theory"] = row["ms"] / images, theory
        row["growth"] = row["ms_each"] / (start["ms"] / start_images)
        row["least_growth"] = row["fastest"] / images / (start["fastest"] / start_images)
        row["most_growth"] = row["slowest"] / images / (start["slowest"] / start_images)
    if given.processes > 1:
        exchanged, trained = exchanged_bytes(given.processes)
        name = f"processes {given.processes}"
        rows.append({"name": name, "bytes": exchanged, "trained_bytes": trained})
    return deliver("growth", given, COLUMNS, rows)


if __name__ == "__main__":
    main()

"""Seconds of a training step, as ratios to plain full fine-tuning in fp32 in the same run.

    python benchmarks/train_step.py [--network emoji_s] [--batch 16] [--rounds 5] [--methods] [--device cuda]

On CPUs processor time of one thread, which other work on a machine hardly changes; on GPUs time. Variants are timed in
turn, in rounds, so that a slow moment meets all of them; medians are shown.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from ditune.commands.parameters import build_method
from ditune.config.components import freeze_in_bf16
from ditune.networks import DiT, build_network, dit
from ditune.objectives import GaussianDiffusion
from ditune.processes import GaussianProcess
from ditune.rng import Draws
from ditune.training.ema import Ema

PEFT = Path(__file__).resolve().parents[1] / "configs" / "peft"
CLASSES, SIZE, CHANNELS = 98, 32, 3


def trained_network(name: str) -> DiT:
    """A network whose zero-initialised layers have moved, as in any that is fine-tuned."""
    network = build_network(name, input_size=SIZE, in_channels=CHANNELS, num_classes=CLASSES, learn_sigma=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02, generator=generator)
    return network


def step_function(
    name: str,
    batch: int,
    method: str,
    bf16: bool,
    frozen_bf16: bool = False,
    compile_: bool = False,
    lean: bool = True,
    device: str = "cpu",
) -> Callable[[], None]:
    """One optimizer step with EMA. `lean`: fused AdamW, and optimizer and EMA only over what trains."""
    network = trained_network(name).to(device)
    peft = build_method(method, PEFT)
    peft.apply(network)
    network.to(device)  # what the method has added too
    if frozen_bf16:
        freeze_in_bf16(network)
    if compile_:
        network.compile_blocks()
    trainable = peft.trainable(network)
    optimizer = torch.optim.AdamW(list(trainable.values()), lr=1e-3, weight_decay=0.0, fused=lean, foreach=False)
    ema = Ema(trainable if lean else dict(network.named_parameters()), decay=0.9999)
    objective = GaussianDiffusion(GaussianProcess(prediction="x0", variance="fixed_small"), weight="v")
    x0 = torch.randn(batch, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1)).to(device)
    y = torch.arange(batch, device=device) % CLASSES
    draws = Draws(0, 0, range(batch), device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = objective.loss(network, (x0, y), draws)
        (loss.total + peft.penalty(network)).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(100)

    return step


@contextmanager
def fused_attention():
    """The one kernel of torch everywhere, also where this project writes attention out."""
    original = dit.attention
    dit.attention = torch.nn.functional.scaled_dot_product_attention
    try:
        yield
    finally:
        dit.attention = original


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", default="emoji_s")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", action="store_true", help="every method, as the main job trains it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    build = partial(step_function, arguments.network, arguments.batch, device=arguments.device)
    variants = {
        "full, fp32, loop AdamW": build("full", bf16=False, lean=False),
        "full, fp32": build("full", bf16=False),
        "full, bf16": build("full", bf16=True),
        "full, bf16, compiled blocks": build("full", bf16=True, compile_=True),
        "difffit, fp32": build("difffit", bf16=False),
        "difffit, bf16, frozen weights in bf16": build("difffit", bf16=True, frozen_bf16=True),
        "the same, compiled blocks": build("difffit", bf16=True, frozen_bf16=True, compile_=True),
        "bitfit, bf16, frozen weights in bf16": build("bitfit", bf16=True, frozen_bf16=True),
    }
    if arguments.methods:
        names = sorted(path.stem for path in PEFT.glob("[!_]*.yaml"))
        variants = {"full, fp32": variants["full, fp32"], "full, bf16": variants["full, bf16"]}
        variants |= {name: build(name, bf16=True, frozen_bf16=True) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in [*variants, "full, bf16, fused attention kernel"]}
    for round_ in range(arguments.rounds + 1):
        for name, step in variants.items():
            seconds[name].append(timed(step, arguments.device))
        with fused_attention():
            seconds["full, bf16, fused attention kernel"].append(timed(variants["full, bf16"], arguments.device))
        if round_ == 0:  # allocates and compiles
            for values in seconds.values():
                values.clear()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    reference = medians["full, fp32"]
    rows = [f"{n:42} {s * 1e3:8.1f} ms   {reference / s:5.2f}x" for n, s in medians.items()]
    sys.stdout.write("\n".join(rows) + "\n")
    facts = {"device": arguments.device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    sys.stdout.write(json.dumps(facts | medians) + "\n")


def timed(step: Callable[[], None], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        step()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

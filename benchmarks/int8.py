"""What frozen_weights=int8 costs and saves on the shipped base, on one thread of a CPU in fp32.

    python benchmarks/int8.py [--images 1000] [--rounds 5] [--methods difffit,lora]

Prints the loss of the base itself on held-out images, with fp32 and with int8, and for each method: memory of the
matrices of the blocks, what autograd keeps in a step of 16 images, and the processor time of such a step.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig

from ditune import cli
from ditune.checkpoints import load_network
from ditune.commands.prepare import held_out_images, held_out_source
from ditune.config.components import build_components
from ditune.evaluation.denoising_loss import denoising_loss
from ditune.networks.int8 import quantise
from ditune.objectives import State
from ditune.rng import StepRandom
from ditune.training.components import Components
from ditune.training.plan import saved_activations

BATCH = 16
FORMS = ("null", "int8")


def config(method: str, form: str, folder: Path) -> DictConfig:
    """The main job's config in fp32."""
    cli.prepare()
    with hydra.initialize_config_dir(cli.CONFIGS, version_base="1.3"):
        keys = [f"peft={method}", f"frozen_weights={form}", "trainer.precision=32-true", "data.latents=false"]
        return hydra.compose("train", [*keys, f"paths.output_dir={folder}"])


def base_losses(cfg: DictConfig, parts: Components, images: int | None) -> Iterator[tuple[str, float]]:
    """Loss on held-out images of the base by what of it is rounded."""
    unseen = held_out_source(cfg, held_out_images(cfg), parts.autoencoder)
    for form in ("fp32", "int8"):
        network = load_network(Path(cfg.pretrained)).requires_grad_(False).eval()
        if form == "int8":
            quantise(network)
        yield form, denoising_loss(network, parts.objective, unseen, parts.settings.metrics_seed, False, images)


def step_seconds(parts: Components) -> float:
    """Processor time of a forward and a backward pass."""
    shape = parts.autoencoder.latent_shape(parts.settings.resolution)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(BATCH, *shape, generator=generator), torch.arange(BATCH)
    state = State(0, 1, BATCH, parts.network, parts.network, parts.network)
    start = time.process_time()
    parts.objective.loss(parts.network.train(), batch, StepRandom(0, 0, range(BATCH)), state).total.mean().backward()
    return time.process_time() - start


def facts(parts: Components) -> dict[str, float]:
    """MiB of the matrices in the blocks, and of what autograd keeps."""
    shape = parts.autoencoder.latent_shape(parts.settings.resolution)
    matrices = [p for p in parts.network.blocks.parameters() if p.ndim == 2 and not p.requires_grad]
    kept = saved_activations(parts.network, parts.objective, shape, bf16=False)
    return {"weights": sum(p.nbytes for p in matrices) / 2**20, "kept": BATCH * kept / 2**20}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print both tables; returns their values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, help="held-out images; all of them if it is left out")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each form, in turn")
    parser.add_argument("--methods", default="difffit,lora")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    values: dict[str, Any] = {"loss": {}}
    with tempfile.TemporaryDirectory() as folder:
        for method in given.methods.split(","):
            configs = [config(method, form, Path(folder)) for form in FORMS]
            both = [build_components(cfg) for cfg in configs]
            if not values["loss"]:
                values["loss"] = dict(base_losses(configs[0], both[0], given.images))
                sys.stdout.write("".join(f"loss of the base, {k}: {v:.6f}\n" for k, v in values["loss"].items()))
            times = [[step_seconds(parts) for parts in both] for _ in range(given.rounds)]
            ratio = statistics.median(int8 / fp32 for fp32, int8 in times)
            row = {form: facts(parts) for form, parts in zip(FORMS, both, strict=True)} | {"ratio": ratio}
            values[method] = row
            for form in FORMS:
                sys.stdout.write(f"{method}, {form}: " + ", ".join(f"{k} {v:.2f} MiB" for k, v in row[form].items()))
                sys.stdout.write("\n")
            sys.stdout.write(f"{method}: a step takes {ratio:.3f} times the processor time with int8\n")
    return values


if __name__ == "__main__":
    main()

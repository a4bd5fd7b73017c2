"""What a run is going to do, shown before it does it."""

import logging
import re
from pathlib import Path

import pytorch_lightning as pl
import torch
from rich.table import Table
from torch import Tensor, nn

from ditune.data.stream import micro_batch_size
from ditune.objectives import Objective, State
from ditune.peft import PeftMethod
from ditune.progress import console
from ditune.rng import StepRandom
from ditune.training.components import Components

log = logging.getLogger(__name__)


def parameter_kinds(network: nn.Module) -> dict[str, list[int]]:
    """Numbers of trained and frozen parameters by kind; blocks are summed up."""
    counts: dict[str, list[int]] = {}
    for name, parameter in network.named_parameters():
        kind = re.sub(r"^blocks\.\d+\.", "blocks.*.", name)
        counts.setdefault(kind, [0, 0])[0 if parameter.requires_grad else 1] += parameter.numel()
    return counts


def parameter_table(network: nn.Module, method: PeftMethod) -> Table:
    """Trainable and frozen parameters by kind."""
    counts = parameter_kinds(network)
    trainable, frozen = (sum(column) for column in zip(*counts.values(), strict=True))
    table = Table(title=f"{method.title}: {trainable:,} of {trainable + frozen:,} parameters train")
    table.add_column("parameter")
    table.add_column("trains", justify="right")
    table.add_column("frozen", justify="right")
    for kind, (train, freeze) in counts.items():
        if train:
            table.add_row(kind, f"{train:,}", f"{freeze:,}" if freeze else "")
    silent = [freeze for train, freeze in counts.values() if not train]
    table.add_row(f"all {len(silent)} others", "", f"{sum(silent):,}")
    table.add_section()
    table.add_row("sum", f"{trainable:,}", f"{frozen:,}")
    return table


def counts(network: nn.Module) -> tuple[int, int]:
    """Trainable and total parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in network.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def expected_memory(
    network: nn.Module,
    objective: Objective,
    latent_shape: tuple[int, ...],
    micro_batch: int,
    bf16: bool,
    fused: bool = False,
) -> dict[str, float]:
    """MiB of parameters, of gradients with optimizer state and EMA, and of what one micro-batch saves for its backward.

    The last is measured on two samples, by counting the tensors that autograd keeps. `fused`: the run's device has a
    fused kernel for attention (GPUs have), which keeps no attention weights.
    """
    parameters = list(network.parameters())

    def saved() -> float:
        return saved_bytes(network, objective, latent_shape, bf16, fused)

    activations = saved()
    if network.gradient_checkpointing:  # one block at a time is computed again
        network.gradient_checkpointing = False
        activations += (saved() - activations) / len(network.blocks)
        network.gradient_checkpointing = True
    weights = sum(p.numel() * p.element_size() for p in parameters)
    training = sum(4 * 4 * p.numel() for p in parameters if p.requires_grad)  # gradient, two moments, EMA in fp32
    return {
        "parameters": weights / 2**20,
        "gradients, optimizer, EMA": training / 2**20,
        "saved activations": activations * micro_batch / 2**20,
    }


def saved_bytes(
    network: nn.Module, objective: Objective, latent_shape: tuple[int, ...], bf16: bool, fused: bool
) -> float:
    """Bytes that autograd keeps for one image, see `expected_memory`."""
    owned = {p.untyped_storage().data_ptr() for p in network.parameters()}
    tokens, heads = network.pos_embed.shape[1], network.config["num_heads"]
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        weights_of_attention = tensor.shape[-2:] == (tokens, tokens) and tensor.numel() == 2 * heads * tokens**2
        if storage.data_ptr() not in owned and not (fused and weights_of_attention):
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = next(network.parameters()).device
    x0 = torch.zeros(2, *latent_shape, device=device)
    zeros = torch.zeros(2, dtype=torch.int64, device=device)
    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with hooks, torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        state = State(step=0, max_steps=1, batch_size=2, ema=network, teacher=network)
        objective.loss(network, (x0, zeros), StepRandom(0, 0, range(2), device), state)
    return sum(saved.values()) / 2


def announce(c: Components, trainer: pl.Trainer, folder: Path, config: str | None) -> None:
    """Show what is going to happen, on one screen.

    Args:
        c: what the run is made of.
        trainer: that will train it.
        folder: of the run.
        config: the full config as text, to be shown too; None = not.
    """
    for note in c.images.notes:
        log.warning("%s", note)
    show = console(soft_wrap=True)
    if config is not None:
        show.print(config)
        show.print(parameter_table(c.network, c.method))
    trained, total = counts(c.network)
    show.print(f"{c.method.title} trains {trained:,} of {total:,} parameters ({trained / total:.2%})")
    for kind, count in trained_kinds(c.network).items():
        show.print(f"  {kind:<22}{count:>13,}")
    for key, value in facts(c, trainer, folder).items():
        show.print(f"{key:<12}{value}")


def facts(c: Components, trainer: pl.Trainer, folder: Path) -> dict[str, str]:
    """What a run is made of, a line each."""
    settings, spread = c.settings, c.processes
    micro = micro_batch_size(settings.batch_size, spread.accumulate, spread.world_size)
    shape = c.autoencoder.latent_shape(settings.resolution)
    fused = trainer.strategy.root_device.type != "cpu"
    memory = expected_memory(c.network, c.objective, shape, micro, settings.bf16, fused)
    passes = settings.max_steps * settings.batch_size / len(c.images)
    return {
        "base": "none, from scratch" if c.base is None else f"{c.base.path} ({c.base.sha256[:12]})",
        "data": f"{settings.data_name}, {len(c.images):,} images, {c.images.describe_classes()}",
        "latents": f"{' x '.join(map(str, shape))}, autoencoder {c.autoencoder.name}",
        "steps": f"{settings.max_steps:,} of {settings.batch_size} images ({passes:.1f} passes over the data)",
        "batch": f"{micro} x {spread.accumulate} micro-steps x {spread.world_size} processes"
        + (", in smaller micro-batches where that does not fit" if spread.searched else ""),
        "memory": ", ".join(f"{k} {v:,.0f} MiB" for k, v in memory.items()) + " (expected)",
        "device": device(settings.precision, trainer),
        "folder": f"{folder} (config.yaml there has every setting; verbose=true shows them)",
    }


def device(precision: str, trainer: pl.Trainer) -> str:
    """Which device and precision were chosen, and how to choose others."""
    kind = trainer.strategy.root_device.type
    name = torch.cuda.get_device_name() if kind == "cuda" else f"{torch.get_num_threads()} threads"
    others = "trainer=cpu" if kind == "cuda" else "trainer=gpu"
    return f"{kind} ({name}), {precision}; others: {others}, trainer=ddp, trainer.precision=..."


KINDS = {  # the first that is found in a parameter's name
    "y_embedder": "label embeddings",
    "gamma": "scale factors gamma",
    ".adapter.": "adapters",
    "prompts": "prompts",
    ".default": "injected factors",
    "router": "routers",
    "experts": "experts",
    "norm": "norms",
    "bias": "biases",
    "": "weights",
}


def trained_kinds(network: nn.Module) -> dict[str, int]:
    """Numbers of trained parameters by what they are."""
    sums: dict[str, int] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            kind = next(kind for part, kind in KINDS.items() if part in name)
            sums[kind] = sums.get(kind, 0) + parameter.numel()
    return sums

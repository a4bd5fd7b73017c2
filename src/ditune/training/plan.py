"""What a run is going to do, shown before it does it."""

import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

import pytorch_lightning as pl
import torch
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from ditune.data.stream import micro_batch_size
from ditune.networks.unfilled import skeleton
from ditune.networks.unread import unread_of
from ditune.objectives import Objective, State
from ditune.peft import PeftMethod
from ditune.progress import console
from ditune.rng import StepRandom
from ditune.training.components import Components

log = logging.getLogger(__name__)


SHARES = (2, 8, 16, 32)  # numbers of processes that a plan compares


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
    per_sample: float | None = None,
    shares: int = 1,
) -> dict[str, float]:
    """MiB of parameters, of gradients with optimizer state and EMA, and of what one micro-batch saves for its backward.

    Args:
        network, objective, latent_shape, bf16, fused: as in `saved_activations`.
        micro_batch: samples of one process in one micro-step.
        per_sample: what `saved_activations` has given for an equal network; None = it is asked.
        shares: processes that the network is spread over; a block is whole for as long as it computes.
    """
    if per_sample is None:
        per_sample = saved_activations(network, objective, latent_shape, bf16, fused)
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    frozen = [] if objective.teacher is None else objective.teacher.network.parameters()
    training = sum(4 * 4 * p.numel() for p in network.parameters() if p.requires_grad)  # gradient, two moments, EMA
    if shares > 1:
        blocks = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in network.blocks]
        weights, training = weights / shares + max(blocks), training / shares
    weights += sum(p.numel() * p.element_size() for p in frozen)  # of a teacher, which every process has
    return {
        "parameters": weights / 2**20,
        "gradients, optimizer, EMA": training / 2**20,
        "saved activations": per_sample * micro_batch / 2**20,
    }


def saved_activations(
    network: nn.Module, objective: Objective, latent_shape: tuple[int, ...], bf16: bool, fused: bool = False
) -> float:
    """Bytes that one sample saves for its backward, counted as the tensors that autograd keeps of two samples.

    Args:
        network: with the method applied to it.
        objective: of the training.
        latent_shape: (C, h, w).
        bf16: whether it runs under bf16 autocast.
        fused: whether the run's device has a fused kernel for attention (GPUs have), which keeps no attention weights.
    """

    def saved() -> float:
        return saved_bytes(network, objective, latent_shape, bf16, fused)

    activations = saved()
    if network.gradient_checkpointing:  # one block at a time is computed again
        network.gradient_checkpointing = False
        activations += (saved() - activations) / len(network.blocks)
        network.gradient_checkpointing = True
    return activations


def saved_bytes(
    network: nn.Module, objective: Objective, latent_shape: tuple[int, ...], bf16: bool, fused: bool
) -> float:
    """Bytes that autograd keeps for one image in one pass, see `saved_activations`; a network may lack values.

    The load of experts is even then.
    """
    is_meta = next(network.parameters()).is_meta
    if unread_of(network) is None and not is_meta:
        return _saved_bytes(network, objective, latent_shape, bf16, fused)
    shapes, asked = skeleton(network), deepcopy(objective)  # which keeps tables of the device, fake ones here
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in shapes.modules():
            for slots in (module._parameters, module._buffers):
                slots |= {name: _fake(tensor) for name, tensor in slots.items() if tensor is not None}
        with suppress(DataDependentOutputException, DynamicOutputShapeException):
            return _saved_bytes(shapes, asked, latent_shape, bf16, fused)
    if is_meta:  # what is done depends on numbers, as in few-step objectives: zeros are enough
        network = skeleton(network).to_empty(device="cpu")
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.data.zero_()
    return _saved_bytes(network, objective, latent_shape, bf16, fused)


def _fake(tensor: Tensor) -> Tensor:
    """A tensor on the CPU that takes no memory, inside of a FakeTensorMode."""
    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _saved_bytes(
    network: nn.Module, objective: Objective, latent_shape: tuple[int, ...], bf16: bool, fused: bool
) -> float:
    owned = {tensor.untyped_storage()._cdata for tensor in (*network.parameters(), *network.buffers())}
    tokens, heads = network.pos_embed.shape[1], network.config["num_heads"]
    saved: dict[int, torch.UntypedStorage] = {}  # kept, so that no other storage gets its number

    def count(tensor: Tensor) -> None:  # the graph gets nothing: one that holds its own outputs is never freed
        if tensor.layout is not torch.strided:
            return  # sparse ones have no storage of their own, and are small
        storage = tensor.untyped_storage()
        weights_of_attention = tensor.shape[-2:] == (tokens, tokens) and tensor.numel() == 2 * heads * tokens**2
        if storage._cdata not in owned and not (fused and weights_of_attention):
            saved[storage._cdata] = storage

    device = next(network.parameters()).device
    x0 = torch.zeros(2, *latent_shape, device=device)
    zeros = torch.zeros(2, dtype=torch.int64, device=device)
    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with hooks, torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        state = State(step=0, max_steps=1, batch_size=2, ema=network, teacher=network, base=network)
        objective.largest.loss(network, (x0, zeros), StepRandom(0, 0, range(2), device), state)
    return sum(storage.nbytes() for storage in saved.values()) / 2


def announce(
    c: Components,
    trainer: pl.Trainer | None,
    folder: Path,
    config: str | None,
    more: Mapping[str, str] | None = None,
    per_sample: float | None = None,
) -> None:
    """Show what is going to happen, on one screen.

    Args:
        c: what the run is made of.
        trainer: that will train it; None = it cannot be made here.
        folder: of the run.
        config: the full config as text, to be shown too; None = not.
        more: further lines, as of `facts`.
        per_sample: see `expected_memory`.
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
    for key, value in (facts(c, trainer, folder, per_sample) | dict(more or {})).items():
        show.print(f"{key:<12}{value}")


def facts(c: Components, trainer: pl.Trainer | None, folder: Path, per_sample: float | None = None) -> dict[str, str]:
    """What a run is made of, a line each; arguments as in `announce`."""
    settings, spread = c.settings, c.processes
    micro = micro_batch_size(settings.batch_size, spread.accumulate, spread.world_size)
    shape = c.autoencoder.latent_shape(settings.resolution)
    fused = trainer is not None and trainer.strategy.root_device.type != "cpu"
    memory = expected_memory(c.network, c.objective, shape, micro, settings.bf16, fused, per_sample, spread.shares)
    of_shares = f"of each of {spread.shares} processes, " if spread.shares > 1 else ""
    if c.sparsity is not None:
        memory["masks, dense copies"] = c.sparsity.memory(c.method.trainable(c.network)) / 2**20
    passes = settings.max_steps * settings.batch_size / len(c.images)
    shares = {"shares": shares_line(c)} if spread.shares > 1 else {}
    return {
        "base": base_line(c),
        "data": f"{settings.data_name}, {len(c.images):,} images, {c.images.describe_classes()}",
        "latents": f"{' x '.join(map(str, shape))}, autoencoder {c.autoencoder.name}",
        "steps": f"{settings.max_steps:,} of {settings.batch_size} images ({passes:.1f} passes over the data)",
        "batch": f"{micro} x {spread.accumulate} micro-steps x {spread.world_size} processes"
        + (", in smaller micro-batches where that does not fit" if spread.searched else ""),
        "memory": ", ".join(f"{k} {v:,.0f} MiB" for k, v in memory.items()) + f" ({of_shares}expected)",
        **shares,
        "device": device(settings.precision, trainer),
        "folder": f"{folder} (config.yaml there has every setting; verbose=true shows them)",
    }


def shares_line(c: Components) -> str:
    """What the network takes of each process, by the number of processes, without activations."""
    shape = c.autoencoder.latent_shape(c.settings.resolution)

    def gib(shares: int) -> float:
        memory = expected_memory(c.network, c.objective, shape, 0, c.settings.bf16, per_sample=0, shares=shares)
        return sum(memory.values()) / 1024

    return ", ".join(f"{gib(n):,.1f} GiB for each of {n}" for n in SHARES) + " processes, without activations"


def base_line(c: Components) -> str:
    """The network that the training begins with."""
    if c.base is None:
        return "none, from scratch"
    return f"{c.base.path} ({c.base.sha256[:12] or 'not read yet'})"


def device(precision: str, trainer: pl.Trainer | None) -> str:
    """Which device and precision were chosen, and how to choose others."""
    if trainer is None:
        return precision
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

"""What a run is going to do, shown before it does it."""

import re

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ditune.objectives import GaussianDiffusion
from ditune.peft import PeftMethod


def parameter_table(network: nn.Module, method: PeftMethod) -> Table:
    """Trainable and frozen parameters by kind; blocks are summed up."""
    counts: dict[str, list[int]] = {}
    for name, parameter in network.named_parameters():
        kind = re.sub(r"^blocks\.\d+\.", "blocks.*.", name)
        counts.setdefault(kind, [0, 0])[0 if parameter.requires_grad else 1] += parameter.numel()
    trainable, frozen = (sum(column) for column in zip(*counts.values(), strict=True))
    table = Table(title=f"{type(method).__name__}: {trainable:,} of {trainable + frozen:,} parameters train")
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
    network: nn.Module, objective: GaussianDiffusion, latent_shape: tuple[int, ...], micro_batch: int, bf16: bool
) -> dict[str, float]:
    """MiB of parameters, of gradients with optimizer state and EMA, and of what one micro-batch saves for its backward.

    The last is measured on two samples, by counting the tensors that autograd keeps.
    """
    parameters = list(network.parameters())
    owned = {p.untyped_storage().data_ptr() for p in parameters}
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    device = parameters[0].device
    x0 = torch.zeros(2, *latent_shape, device=device)
    zeros = torch.zeros(2, dtype=torch.int64, device=device)
    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with hooks, torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        objective.losses(network, x0, zeros, zeros, torch.ones_like(x0))["loss"].sum()
    weights = sum(p.numel() * p.element_size() for p in parameters)
    training = sum(4 * 4 * p.numel() for p in parameters if p.requires_grad)  # gradient, two moments, EMA in fp32
    activations = sum(saved.values()) / 2 * micro_batch
    return {
        "parameters": weights / 2**20,
        "gradients, optimizer, EMA": training / 2**20,
        "saved activations": activations / 2**20,
    }


def show(console: Console, facts: dict[str, str]) -> None:
    table = Table(show_header=False)
    for key, value in facts.items():
        table.add_row(key, value)
    console.print(table)

"""One of several processes that train a DiT-MoE with an expert that nobody takes; started by test_balance.py."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ditune.moe.balance import Balance, Watched
from ditune.networks import build_network

STEPS, BATCH = 20, 8


def network_with_an_empty_expert():
    torch.manual_seed(0)
    network = build_network("tiny_moe", input_size=8, num_classes=3, in_channels=2, learn_sigma=False)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)  # past the start, where blocks are the identity
        for layer in network.moe_layers.values():
            layer.router.bias_E += torch.tensor([0.3, 0.1, 0.0, -10.0])
    return network


def train(rank: int, world: int) -> dict[str, torch.Tensor]:
    """`STEPS` steps of SGD on this process's part of the global batches; returns parameters and biases."""
    network = network_with_an_empty_expert()
    watched = Watched(network)
    balance = Balance(scope="global", alpha=0.1, bias_rate=0.01)

    class Step(torch.nn.Module):
        """Everything between parameters and loss, as the trainer wraps it."""

        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x, t, y, step):
            return watched(x, t, y).square().mean() + balance.loss(watched.routing, step)[0]

    step_of = Step() if world == 1 else DistributedDataParallel(Step())  # find_unused_parameters is off
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        x, t = torch.randn(BATCH, 2, 8, 8, generator=generator), torch.rand(BATCH, generator=generator)
        y = torch.randint(4, (BATCH,), generator=generator)
        mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        optimizer.zero_grad()
        step_of(x[mine], t[mine], y[mine], step).backward()
        assert all(p.grad is not None for p in network.parameters())
        assert not any(layer.chosen_NTE[..., 3].any() for layer in watched.routing)
        balance.update(network)
        optimizer.step()
    return {name: value.clone() for name, value in network.state_dict().items()}


def train_a_part(rank: int, folder: Path) -> None:
    """One of two processes; what it has learned goes into a file."""
    dist.init_process_group("gloo")
    torch.save(train(rank, 2), folder / f"{rank}.pt")
    dist.destroy_process_group()

"""Images cost what was asked for, and image i of a seed is the same whatever is drawn beside it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ditune.autoencoders import Pixels
from ditune.generation.generator import ImageGenerator
from ditune.networks import DiT
from ditune.processes import FlowProcess, GaussianProcess
from ditune.samplers import DDIM, DDPM, Euler


class Recorded(nn.Module):
    """A network that remembers the sizes of its batches."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.num_classes, self.sizes = network, network.num_classes, []

    def forward(self, x: Tensor, *conditions: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return self.network(x, *conditions)


@pytest.fixture(scope="module")
def network() -> Recorded:
    """Every branch of it does something: a fresh DiT gives zeros whatever its batch is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = DiT(input_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=4)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
    return Recorded(network.eval())


def drawer(sampler: str = "ddim", **settings: object) -> ImageGenerator:
    flow = sampler == "euler"
    process = FlowProcess() if flow else GaussianProcess()
    own = {"ddim": DDIM(clip=1.0), "ddpm": DDPM(clip=1.0), "euler": Euler()}[sampler]
    defaults = {"steps": 4, "guidance": 1.0, "batch_size": 8, "bf16": False}
    return ImageGenerator(process, Pixels(), 8, own, **(defaults | settings))


@pytest.mark.parametrize(
    ("n", "batch_size", "sizes"),
    [(1, 64, [1]), (3, 64, [4]), (8, 8, [8]), (13, 8, [8, 8]), (18, 8, [8, 8, 2]), (5, 6, [6]), (7, 6, [6, 1])],
)
def test_batches_are_padded_to_the_next_power_of_two(network, n, batch_size, sizes):
    labels = torch.arange(n) % 4
    for fixed, expected in ((False, sizes), (True, [batch_size] * len(sizes))):
        network.sizes.clear()
        images = drawer(steps=1, sampler="euler", batch_size=batch_size).draw(network, labels, 0, fixed_batch=fixed)
        assert network.sizes == expected
        assert len(images) == n


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_image_i_is_the_same_however_many_are_drawn(network, sampler, guidance):
    generator = drawer(sampler, guidance=guidance)
    labels = torch.arange(19) % 4
    whole = replace(generator, batch_size=32).draw(network, labels, 5, fixed_batch=True)
    assert whole.float().std() > 30  # they are images and not one colour
    assert (whole[0] != whole[4]).float().mean() > 0.5  # same class, other noise
    for first, n in ((0, 19), (0, 5), (3, 1), (7, 12)):
        rows = list(range(first, first + n))
        some = generator.generate(network, labels[rows], 5, rows)
        assert (some.int() - whole[rows].int()).abs().max() <= 1


def test_a_fixed_batch_gives_equal_bits(network):
    generator, labels = drawer(guidance=2.0), torch.arange(19) % 4
    whole = generator.generate(network, labels, 5, fixed_batch=True)
    for rows in ([0], list(range(8, 11)), list(range(16, 19))):
        assert torch.equal(generator.generate(network, labels[rows], 5, rows, fixed_batch=True), whole[rows])

"""T-LoRA: the number of ranks by time, exactly, in training and in sampling."""

from fractions import Fraction

import pytest
import torch
from torch.testing import assert_close

from ditune.checkpoints import load_adapter, save_adapter
from ditune.errors import UserError
from ditune.peft import build_peft
from ditune.peft.tlora import Ranks
from ditune.processes import FlowProcess, GaussianProcess
from peft_helpers import adapt, build_base, inputs, output


def trained(name: str = "tlora", **arguments):
    """Every factor with values, the same for methods with the same parameters."""
    network, method = adapt("dit", name, **arguments)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in method.trainable(network).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return network, method


@pytest.mark.parametrize("times", [(0.0, 1000.0), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize(("r", "min_r", "power"), [(8, 1, 1), (64, 0, 1), (10, 3, 2), (4, 4, 1), (101, 1, 1)])
def test_the_number_of_ranks_is_the_papers(r, min_r, power, times):
    """floor(((T - t) / T)^power (r - min_r)) + min_r in exact arithmetic, for every timestep of DiT."""
    ranks, (data, noise) = Ranks(r, min_r, power, times), times
    ranks.set(torch.tensor([data + (noise - data) * t / 1000 for t in range(1001)], dtype=torch.float64))
    expected = [int(Fraction(1000 - t, 1000) ** power * (r - min_r)) + min_r for t in range(1001)]
    assert ranks.mask.sum(dim=1).tolist() == expected
    assert torch.equal(ranks.mask, ranks.mask.sort(dim=1, descending=True).values)  # the first ones


def test_every_sample_has_a_lora_of_its_own_rank():
    """A batch at four times is as four LoRAs whose further ranks are zero."""
    network, _ = trained()
    x, _, y = inputs()
    t = torch.tensor([0.0, 300.0, 700.0, 999.0])
    found = network(x, t, y)
    for i, rank in enumerate([8, 5, 3, 1]):  # floor((1 - t / 1000) 7) + 1
        plain, _ = trained("lora")
        for block in plain.blocks:
            block.attn.qkv.lora_A["default"].weight.data[rank:] = 0
        one = slice(i, i + 1)
        assert_close(found[one], plain(x[one], t[one], y[one]), atol=1e-6, rtol=1e-5)


def test_all_ranks_at_all_times_are_lora():
    x, t, y = inputs()
    network, method = trained(min_r=8)
    plain, plain_method = trained("lora")
    assert torch.equal(network(x, t, y), plain(x, t, y))
    for one, other in ((network, method), (plain, plain_method)):
        one(x, t, y).square().mean().backward()
        assert list(method.trainable(network)) == list(other.trainable(one))
    for a, b in zip(method.trainable(network).values(), plain_method.trainable(plain).values(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_ranks_that_do_not_act_are_not_trained():
    network, _ = trained()
    x, _, y = inputs()
    network(x, torch.full((4,), 999.0), y).square().mean().backward()
    layer = network.blocks[0].attn.qkv
    down, up = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
    assert down[0].abs().max() > 0
    assert up[:, 0].abs().max() > 0
    assert not down[1:].any()
    assert not up[:, 1:].any()


def test_a_block_that_is_computed_again_has_the_ranks_of_its_own_call():
    """Another call of the network, at another time, stands between a call and its gradients."""
    x, t, y = inputs()
    found = []
    for checkpointing in (False, True):
        network, method = trained()
        network.gradient_checkpointing = checkpointing
        loss = network(x, t, y).square().mean()
        with torch.no_grad():
            network(x, torch.zeros(4), y)
        loss.backward()
        found.append([p.grad for p in method.trainable(network).values()])
    for plain, again in zip(*found, strict=True):
        assert_close(again, plain, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    ("process", "times"),
    [
        (GaussianProcess(), [0, 1000]),
        (FlowProcess(), [0, 1000]),
        (FlowProcess(time_scale=1.0, data_at=1), [1, 0]),
        (FlowProcess(diffusion=GaussianProcess().config), [0, 1000]),
    ],
)
def test_the_times_are_those_of_the_process_and_stay_with_the_adapter(process, times, tmp_path):
    method = build_peft("tlora", lr=1e-3)
    method.bind(process.part)
    assert list(method.ranks.times) == times
    given = build_peft("tlora", lr=1e-3, times=[5, 7])
    given.bind(process.part)
    assert list(given.ranks.times) == [5, 7]
    network = build_base("dit")
    method.apply(network)
    with torch.no_grad():
        for parameter in method.trainable(network).values():
            parameter += 0.1
    save_adapter(network, tmp_path)
    again = build_base("dit")
    assert list(load_adapter(again, tmp_path).ranks.times) == times
    assert torch.equal(output(again), output(network))


@pytest.mark.parametrize("arguments", [{"min_r": 9}, {"times": [3]}, {"times": [3, 3]}])
def test_values_that_cannot_be(arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        build_peft("tlora", lr=1e-3, **arguments)

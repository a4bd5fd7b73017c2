"""Guides: one formula, whatever the unconditional branch is."""

import pytest
import torch
from torch import Tensor

from ditune.config.guides import build_guide
from ditune.errors import UserError
from ditune.networks import DiT
from ditune.peft import build_peft
from ditune.peft.slots import slots
from ditune.processes import FlowProcess, GaussianProcess
from ditune.samplers import (
    DDIM,
    BaseGuide,
    CheckpointGuide,
    Euler,
    Fora,
    Guide,
    InterpolatedGuide,
    ShortcutSampler,
    sample,
)
from helpers import open_gates

CASES = {
    "diffusion": (GaussianProcess(timesteps=100, variance="fixed_small"), DDIM()),
    "flow": (FlowProcess(), Euler()),
    "shortcut": (FlowProcess(step="size", base_steps=8), ShortcutSampler()),
}
METHODS = ("full", "difffit", "lora", "adaptformer")
X, Y = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2, 1])


def network_of(process) -> DiT:
    torch.manual_seed(0)
    sizes = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    network = DiT(**sizes, learn_sigma=False, **process.network).eval()
    open_gates(network)
    return network


class TwoCalls(Guide):
    """Plain guidance, computed in two calls of N."""

    kind = "two calls"

    def bind(self, network, process, y):
        called, null = process.bind(network), torch.full_like(y, network.num_classes)
        return lambda x, t, *step: called(x, t, null, *step)


def images(network: DiT, case: str, guide: Guide | None, **settings) -> Tensor:
    process, sampler = CASES[case]
    settings = {"guidance": 3.0, "steps": 4} | settings
    return sample(network, process, X, Y, sampler=sampler, guide=guide, **settings)


def adapted(case: str, method: str, moved: bool) -> tuple[DiT, DiT]:
    """An adapted network that has kept its base, and that base."""
    network, base = network_of(CASES[case][0]), network_of(CASES[case][0])
    peft = build_peft(method, lr=1e-3)
    peft.apply(network, base=slots(network))
    if moved:
        generator = torch.Generator().manual_seed(2)
        for parameter in peft.trainable(network).values():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return network.eval(), base


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_before_training_every_guide_is_plain_guidance(case, method):
    network, base = adapted(case, method, moved=False)
    plain, two_calls = images(network, case, None), images(network, case, TwoCalls())
    process = CASES[case][0].config
    assert (two_calls - plain).norm() <= 1e-5 * plain.norm()  # one call of 2N rounds in another order
    assert torch.equal(images(network, case, BaseGuide()), two_calls)
    assert torch.equal(images(network, case, InterpolatedGuide(0.3)), two_calls)
    assert torch.equal(images(base, case, BaseGuide()), two_calls), "a network that is not adapted is its own base"
    itself = images(network, case, CheckpointGuide(network, "", process))  # conditional - conditional
    assert torch.equal(itself, images(network, case, None, guidance=1.0))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_after_training_the_branch_is_the_bases(case, method):
    network, base = adapted(case, method, moved=True)
    process = CASES[case][0]

    class ByHand(Guide):
        kind = "by hand"

        def bind(self, network, process, y):
            called, null = process.bind(base), torch.full_like(y, base.num_classes)
            return lambda x, t, *step: called(x, t, null, *step)

    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = images(network, case, BaseGuide())
    assert torch.equal(found, images(network, case, ByHand()))
    assert not torch.equal(found, images(network, case, TwoCalls()))
    assert torch.equal(images(network, case, InterpolatedGuide(0.0)), found)
    assert torch.equal(images(network, case, InterpolatedGuide(1.0)), images(network, case, TwoCalls()))
    weaker = images(network, case, CheckpointGuide(base, "", process.config))
    assert not torch.equal(weaker, found)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("guide", [BaseGuide(), InterpolatedGuide()])
def test_interval_and_scale_are_as_in_plain_guidance(guide):
    network, _ = adapted("diffusion", "difffit", moved=True)
    unguided = images(network, "diffusion", None, guidance=1.0)
    assert torch.equal(images(network, "diffusion", guide, guidance=1.0), unguided)
    calls = []
    network.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    images(network, "diffusion", guide, guidance_interval=(0.5, 1.0))
    assert calls == [3, 3, 3, 3, 3, 3]  # of four steps the two near the noise are guided, in two calls of N


def test_what_a_guide_refuses():
    network, base = adapted("diffusion", "lora", moved=True)
    with pytest.raises(UserError, match="cache=none"):
        images(network, "diffusion", BaseGuide(), cache=Fora(2))
    with pytest.raises(UserError, match="another process"):
        images(network, "diffusion", CheckpointGuide(base, "", FlowProcess().config))
    other = DiT(input_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=5, learn_sigma=False)
    with pytest.raises(UserError, match="number of classes"):
        images(network, "diffusion", CheckpointGuide(other, "", CASES["diffusion"][0].config))
    method = build_peft("lora", lr=1e-3)
    method.apply(base)
    with pytest.raises(UserError, match="keep_base=True"):
        images(base, "diffusion", BaseGuide())
    for asked in ({"guide": "checkpoint", "guide_checkpoint": None}, {"guide": "base", "guide_checkpoint": "a"}):
        with pytest.raises(UserError, match="guide_checkpoint is"):
            build_guide(asked, ".")

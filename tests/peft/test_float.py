"""peft=float: fixed noise on the weights, its trained scales, and the dial that they are for."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ditune.checkpoints import load_adapter, save_adapter
from ditune.checkpoints.sums import apply_sum, read_terms
from ditune.errors import UserError
from ditune.peft import build_peft, merge
from ditune.peft.slots import slots
from ditune.peft.weight_noise import NoisyLinear
from helpers import assert_same_bits
from peft_helpers import adapt, build_base, inputs, output

BASE = {"file": "base.safetensors", "sha256": "0" * 64, "classes": None}


def trained(seed=3, keep_base=False, **arguments):
    network, method = build_base("dit"), build_peft("float", lr=1e-3, **arguments)
    method.apply(network, slots(network) if keep_base else None)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.trainable(network).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=random)
    return network, method


def noisy(network) -> dict[str, NoisyLinear]:
    return {name: module for name, module in network.named_modules() if isinstance(module, NoisyLinear)}


def with_weights(network, strength: float) -> nn.Module:
    """A plain network with W + strength alpha eta, by hand."""
    plain = build_base("dit")
    with torch.no_grad():
        for name, layer in noisy(network).items():
            plain.get_submodule(name).weight.add_(strength * layer.alpha.detach() * layer.eta)
    return plain


@pytest.mark.parametrize("granularity", ["layer", "row"])
def test_the_scales_and_their_gradients_by_hand(granularity):
    network, _ = trained(granularity=granularity, train_labels=False)
    layers = noisy(network)
    assert {name.split(".", 2)[2] for name in layers} == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert_close(output(network), output(with_weights(network, 1.0)), atol=1e-6, rtol=1e-5)
    plain = with_weights(network, 1.0)
    for each in (network, plain):
        x, t, y = inputs()
        (each(x, t, y) - x).square().mean().backward()
    for name, layer in layers.items():
        per_weight = plain.get_submodule(name).weight.grad * layer.eta
        expected = per_weight.sum(dim=1, keepdim=True) if granularity == "row" else per_weight.sum().view(1, 1)
        assert_close(layer.alpha.grad, expected, atol=1e-6, rtol=1e-4)


def test_the_noise_is_a_function_of_seed_and_layer_and_as_wide_as_the_weight():
    found = [adapt("dit", "float", noise_seed=seed)[0] for seed in (0, 0, 1)]
    one, again, other = (noisy(network) for network in found)
    for name, layer in one.items():
        assert torch.equal(layer.eta, again[name].eta)
        assert not torch.equal(layer.eta, other[name].eta)
        assert layer.eta.std() == pytest.approx(layer.weight.std().item(), rel=0.1)
        assert abs(layer.eta.mean()) < 0.1 * layer.weight.std()
    first, second = (layer.eta for name, layer in one.items() if name.endswith("attn.proj"))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0, 1.5])
def test_strength_is_floats_dial(strength):
    """Noise scaled by lambda: the dial of every method, here on W + lambda alpha eta."""
    network, method = trained(keep_base=True, train_labels=False)
    expected = output(with_weights(network, strength))
    with method.dial.turned(strength):
        assert_close(output(network), expected, atol=0 if strength == 0 else 2e-6, rtol=0)


def test_a_file_holds_the_scales_alone_and_merging_keeps_the_output(tmp_path):
    network, method = trained()
    save_adapter(network, tmp_path)
    again = build_base("dit")
    load_adapter(again, tmp_path)
    assert torch.equal(output(again), output(network))
    assert not any("eta" in name for name in method.state_dict(network))
    merge(again)
    assert not noisy(again)
    assert_close(output(again), output(network), atol=1e-6, rtol=1e-5)


def test_sums_add_the_scales(tmp_path):
    networks = [trained(seed, train_labels=False)[0] for seed in (3, 4)]
    for seed, network in enumerate(networks):
        save_adapter(network, tmp_path / str(seed), base=BASE, process={}, autoencoder="none")
    summed = build_base("dit")
    apply_sum(summed, read_terms({tmp_path / "0": 0.5, tmp_path / "1": -2.0}))
    one, other = (noisy(network) for network in networks)
    for name, layer in noisy(summed).items():
        assert_close(layer.alpha, 0.5 * one[name].alpha - 2 * other[name].alpha, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"granularity": "weight"}, "layer or row"),
        ({"target_modules": "nothing"}, "no layer of this network"),
        ({"target_modules": r"blocks\.0\.attn"}, r"blocks\.0\.attn, no linear layer"),
    ],
)
def test_mistakes_are_refused_and_change_nothing(arguments, part):
    network = build_base("dit")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError, match=part):
        build_peft("float", lr=1e-3, **arguments).apply(network)
    assert_same_bits(dict(network.state_dict()), before)

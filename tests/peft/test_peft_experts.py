"""Methods on DiT-MoE: on attention and adaLN as on any DiT, on the weights of its experts, on its routers."""

import copy

import pytest
import torch
from torch.testing import assert_close

from ditune.checkpoints import load_adapter, save_adapter
from ditune.errors import UserError
from ditune.networks import build_network
from ditune.peft import METHODS, build_peft
from ditune.peft.experts import ON_EXPERTS

SHAPE = {"input_size": 8, "num_classes": 3, "in_channels": 2}
INPUTS = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(3)), torch.rand(2), torch.tensor([0, 3])
ARGUMENTS = {"lora": {"r": 2, "lora_alpha": 4}, "rslora": {"r": 2, "lora_alpha": 4}, "adalora": {}}


def network(expert: str = "swiglu"):
    torch.manual_seed(0)
    made = build_network("tiny_moe", **SHAPE, expert=expert)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


def moved(adapted, method):
    """Let everything that trains move."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.trainable(adapted).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("expert", ["swiglu", "gelu"])
@pytest.mark.parametrize("name", ON_EXPERTS)
def test_on_experts_from_the_identity_to_a_merged_or_stored_adapter(name, expert, tmp_path):
    plain = network(expert)
    before = plain(*INPUTS)
    adapted = copy.deepcopy(plain)
    method = build_peft(name, target="experts", lr=1e-3, train_labels=False, **ARGUMENTS.get(name, {}))
    method.apply(adapted)
    assert_close(adapted(*INPUTS), before, atol=1e-6, rtol=1e-6)
    trained = method.trainable(adapted)
    assert trained
    assert all(".moe." in key for key in trained)
    moved(adapted, method)
    adapted(*INPUTS).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    after = adapted(*INPUTS)
    assert (after - before).abs().max() > 1e-3
    save_adapter(adapted, tmp_path)
    loaded = copy.deepcopy(plain)
    load_adapter(loaded, tmp_path)
    assert_close(loaded(*INPUTS), after, atol=1e-6, rtol=1e-5)
    if method.unmergeable is None:
        method.merge(adapted)
        assert adapted.state_dict().keys() == plain.state_dict().keys()
        assert_close(adapted(*INPUTS), after, atol=1e-5, rtol=1e-5)


def test_only_the_router_trains():
    adapted = network()
    method = build_peft("router", lr=1e-4, train_labels=False)
    method.apply(adapted)
    assert sorted(method.trainable(adapted)) == [f"blocks.{i}.moe.router.weight" for i in range(2)]


@pytest.mark.parametrize("name", sorted(METHODS.keys() - ON_EXPERTS.keys()))
def test_other_methods_refuse_experts(name):
    with pytest.raises(UserError, match=f"peft={name} has no form"):
        build_peft(name, target="experts", lr=1e-3)


def test_a_dense_network_has_no_experts():
    with pytest.raises(UserError, match="no experts"):
        build_peft("router", lr=1e-4).apply(build_network("tiny", **SHAPE))
    with pytest.raises(UserError, match="no target"):
        build_peft("lora", target="routers", lr=1e-4)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_adapts_a_dit_moe(name):
    from ditune.config.instantiate import instantiate
    from helpers import compose

    adapted = network()
    before = adapted(*INPUTS)
    method = instantiate(compose("/tmp/unused", f"peft={name}").peft, "peft", _convert_="all")
    method.apply(adapted)
    if method.starts_as_identity:
        assert_close(adapted(*INPUTS), before, atol=1e-5, rtol=1e-4)
    routing = []
    adapted(*INPUTS, routing=routing).square().sum().backward()
    assert len(routing) == 2

"""Masked runs between base and adapter: their zeros stay, or a strength or a sum is refused; and what masks cost."""

import pytest
import torch

from ditune.checkpoints import load_adapter, save_adapter
from ditune.checkpoints.sums import apply_sum, read_terms
from ditune.config.components import build_components
from ditune.config.training import build_module, resume_key
from ditune.errors import UserError
from ditune.processes import FlowProcess
from ditune.samplers import Euler, Guide, InterpolatedGuide, sample
from ditune.training import Sparsity
from ditune.training.components import Processes
from ditune.training.masks import zeros
from ditune.training.plan import facts as plan_facts
from helpers import assert_same_bits
from peft_helpers import adapt, build_base, train_steps

FACTORS = ".*lora_.*"


@pytest.fixture
def saved(tmp_path):
    """`saved(name, method, target)`: folder of an adapter after two steps, half of whose targets are zero."""

    def save(name, method, target=None, masked=True):
        network, peft = adapt("dit", method)
        train_steps(network, peft, steps=2)
        trained, more = peft.trainable(network), {}
        if masked:
            sparsity = Sparsity("unstructured", target=target, final=0.5)
            sparsity.begin(trained, {key: value.detach().clone() for key, value in trained.items()})
            more = {"sparsity": sparsity.facts(trained)}
        base = {"file": "base.safetensors", "sha256": "of the base", "network": network.config}
        save_adapter(network, tmp_path / name, base=base, process={}, autoencoder="none", **more)
        return tmp_path / name

    return save


def pattern(network):
    return zeros({name: p for name, p in network.named_parameters() if "lora_" in name or "blocks" in name})


def weights(network):
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def test_weights_between_a_masked_network_and_its_dense_base_are_refused(saved):
    network = build_base("dit")
    dense = weights(network)
    dial = load_adapter(network, saved("full", "full"), keep_base=True).dial
    masked = weights(network)
    assert sum(pattern(network).values()) > 0
    for strength in (0.5, 0.999, 1.25):
        with pytest.raises(UserError, match=rf"strength is {strength}.*zeros \(sparsity=\).*blocks\.0\.attn\.qkv"):
            dial.set(strength)
        with pytest.raises(UserError, match="Set it to 0"), dial.turned(strength):
            pass
    assert_same_bits(weights(network), masked)  # refused without a change
    for strength, expected in ((0, dense), (1, masked)):
        dial.set(strength)
        assert_same_bits(weights(network), expected)


def test_zeros_that_the_base_has_too_stay(saved):
    folder = saved("full", "full")
    network, masked = build_base("dit"), build_base("dit")
    load_adapter(masked, folder)
    with torch.no_grad():  # a base that is pruned at the same places
        for name, parameter in network.named_parameters():
            parameter *= masked.get_parameter(name) != 0
    dial = load_adapter(network, folder, keep_base=True).dial
    dial.set(0.5)
    assert dial.strength == 0.5
    assert pattern(network) == pattern(masked)


def test_zeros_of_factors_stay(saved):
    network = build_base("dit")
    dial = load_adapter(network, saved("lora", "lora", FACTORS), keep_base=True).dial
    before = pattern(network)
    assert sum(before.values()) > 0
    for strength in (0.5, 2.0):
        dial.set(strength)
        assert pattern(network) == before


def test_sums_keep_the_zeros_or_are_refused(saved):
    masked, dense = saved("masked", "full"), saved("dense", "full", masked=False)
    for terms in ({masked: 0.5}, {masked: 0.5, dense: 0.5}, {masked: 1.0, dense: 0.5}):
        with pytest.raises(UserError, match=r"would fill zeros of blocks\.0\.attn\.qkv\.weight"):
            apply_sum(build_base("dit"), read_terms(terms))
    network, alone, base = (build_base("dit") for _ in range(3))
    dial = apply_sum(network, read_terms({masked: 1.0})).dial
    load_adapter(alone, masked)
    assert_same_bits(weights(network), weights(alone))
    with pytest.raises(UserError, match=r"strength is 0\.5"):
        dial.set(0.5)
    apply_sum(base, read_terms({masked: 0.0}))  # the base, as strength=0
    assert_same_bits(weights(base), weights(build_base("dit")))


def test_sums_of_sparse_factors_have_the_zeros_of_both(saved):
    one, other = saved("one", "lora", FACTORS), saved("other", "lora", FACTORS)
    alone, both = build_base("dit"), build_base("dit")
    load_adapter(alone, one)
    apply_sum(both, read_terms({one: 0.5, other: 2.0}))
    assert sum(pattern(both).values()) == 2 * sum(pattern(alone).values()) > 0


def test_a_guide_between_a_masked_network_and_its_dense_base_is_dense_and_changes_no_zeros(saved):
    """What is guided stays masked: the guide alone computes with weights between the two."""
    network, between = build_base("dit"), build_base("dit")
    dense = weights(network)
    load_adapter(network, saved("full", "full"), keep_base=True)
    masked, zeros_before = weights(network), pattern(network)
    with torch.no_grad():
        for name, parameter in between.named_parameters():
            parameter.copy_(torch.lerp(dense[name], masked[name], 0.5))
    assert pattern(between) != zeros_before

    class ByHand(Guide):
        kind = "by hand"

        def bind(self, network, process, y):
            called, null = process.bind(between), torch.full_like(y, between.num_classes)
            return lambda x, t, *step: called(x, t, null, *step)

    x, y = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 2, 1])
    settings = {"sampler": Euler(), "guidance": 3.0, "steps": 3}
    found, expected = (
        sample(network.eval(), FlowProcess(), x, y, guide=guide, **settings)
        for guide in (InterpolatedGuide(0.5), ByHand())
    )
    assert torch.equal(found, expected)
    assert pattern(network) == zeros_before
    assert_same_bits(weights(network), masked)


# What the plan says of memory

SPARSE = {
    "none": [],
    "dense": ["sparsity=n_m", "sparsity.pattern=4:4"],
    "hard": ["sparsity=n_m", "sparsity.way=hard"],
    "ste": ["sparsity=n_m"],
    "taught": ["sparsity=n_m", "sparsity.teacher=0.1"],
}


def test_the_plan_counts_what_masks_keep(small, base, tmp_path):
    expected, lines = {}, {}
    for name, overrides in SPARSE.items():
        cfg = small(f"pretrained={base}", "peft=full", *overrides)
        c = build_components(cfg)
        c.processes = Processes(world_size=1, accumulate=1, starts_others=False)
        lines[name] = plan_facts(c, None, tmp_path, per_sample=0.0)["memory"]
        if c.sparsity is None:
            continue
        module = build_module(cfg, c, resume_key(cfg, c))
        c.sparsity.begin(module.trained, module.ema.average)
        kept = [c.sparsity.masks, c.sparsity.dense, c.sparsity.dense_average]
        kept.append({} if module.base is None else module.base.first)
        expected[name] = sum(value.nbytes for values in kept for value in values.values())
        assert c.sparsity.memory(module.trained) == expected[name], name
    assert expected["dense"] == 0 < expected["hard"] < expected["ste"] < expected["taught"]
    assert "masks" not in lines["none"]
    assert "masks, dense copies 0 MiB" in lines["dense"]

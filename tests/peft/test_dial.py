"""The dial between base and adapter, and sums of adapters of one base."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ditune.checkpoints import save_adapter
from ditune.checkpoints.sums import apply_sum, read_terms
from ditune.config.options import load_option
from ditune.errors import UserError
from ditune.networks import DiT, DiTMoE
from ditune.peft import METHODS, PeftMethod, build_peft
from ditune.peft.label_table import adapt_labels
from ditune.peft.slots import slots
from helpers import ROOT, open_gates

SMALLER = {"oft_block_size": 8, "n_frequency": 10, "r": 4, "randlora_alpha": 4}
INPUTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3.0, 500.0])
INPUTS = (*INPUTS, torch.tensor([0, 3]))
BASE = {"file": "base.safetensors", "sha256": "0" * 64, "classes": None}


def network_of(kind: type[nn.Module] = DiT, **sizes) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 3} | sizes
    network = kind(**sizes).eval()
    open_gates(network)
    return network


def method_of(name: str, **arguments) -> PeftMethod:
    option = OmegaConf.create({"max_steps": 10, "peft": load_option(ROOT / "configs" / "peft" / f"{name}.yaml")})
    values = {k: v for k, v in OmegaConf.to_container(option, resolve=True)["peft"].items() if k[0] != "_"}
    return build_peft(**(values | {k: v for k, v in SMALLER.items() if k in values} | arguments))


def adapted(name: str, seed: int = 2, network: nn.Module | None = None, **arguments) -> tuple[nn.Module, PeftMethod]:
    network, method = network or network_of(), method_of(name, **arguments)
    method.apply(network, base=slots(network))
    generator = torch.Generator().manual_seed(seed)
    for parameter in method.trainable(network).values():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network.eval(), method


@torch.no_grad()
def output(network) -> torch.Tensor:
    return network(*INPUTS)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "pissa"])
def test_the_ends_are_exact_and_the_path_leads_from_one_to_the_other(name):
    base = output(network_of())
    network, method = adapted(name)
    end = output(network)
    assert torch.equal(output(method.dial.at(0)), base)
    assert torch.equal(output(method.dial.at(1)), end)
    if method.path is None:
        with pytest.raises(UserError, match="has no path"):
            method.dial.at(0.5)
    else:
        distance = (end - base).norm()
        near, half = ((output(method.dial.at(s)) - base).norm() / distance for s in (1e-3, 0.5))
        assert 0.5e-3 < near < 2e-3
        assert 0.4 < half < 0.6
        assert torch.allclose(output(method.dial.at(1 - 1e-6)), end, atol=1e-4)
    method.dial.set(0)
    assert torch.equal(output(network), base)
    method.dial.set(1)
    assert torch.equal(output(network), end)


def test_of_a_product_one_factor_moves():
    """The other one is random, and its start is not in an adapter's file."""
    _, method = adapted("glora")
    moved = {name.split("qkv.")[1] for name in method.dial.start if "blocks.0" in name}
    assert moved == {
        "glora_A.default.Xd",
        "glora_B.default.Xd",
        "glora_C.default.Xd",
        "glora_D.default.X",
        "glora_E.default.X",
    }


def test_the_dial_is_a_change_of_weights_not_of_factors():
    network, method = adapted("lora", train_labels=False)
    base = network_of().blocks[0].attn.qkv.weight
    full = network.blocks[0].attn.qkv.get_delta_weight("default")
    method.dial.set(0.25)
    method.merge(network)
    assert torch.allclose(network.blocks[0].attn.qkv.weight, base + 0.25 * full, atol=1e-6)


@pytest.mark.parametrize(("name", "target"), [("difffit", "experts"), ("lora", "experts"), ("full", "experts")])
def test_experts_have_a_dial(name, target):
    network = network_of(DiTMoE, num_experts=2, top_k=1)
    base = output(network)
    network, method = adapted(name, network=network, target=target)
    end = output(network)
    assert torch.equal(output(method.dial.at(0)), base)
    assert 0 < (output(method.dial.at(0.5)) - base).norm() < 2 * (end - base).norm()
    assert torch.equal(output(network), end)


def test_rows_of_new_classes_stay_and_the_null_class_moves():
    network = network_of()
    null, before = network.y_embedder.embedding_table.weight[-1].clone(), slots(network)
    adapt_labels(network, "reinit", 5)
    method = method_of("bitfit")
    method.apply(network, base=before, new_classes=True)
    table = network.y_embedder.embedding_table.weight
    table.data.add_(1.0)
    method.dial.set(0.5)
    half = network.y_embedder.embedding_table.weight
    assert torch.equal(half[:-1], table[:-1])
    assert torch.allclose(half[-1], null + 0.5)
    method.dial.set(0)
    assert network.num_classes == 3
    assert torch.equal(network.y_embedder.embedding_table.weight[-1], null)


def test_a_method_that_changes_frozen_weights_keeps_no_base():
    with pytest.raises(UserError, match="changes the base's frozen weights"):
        method_of("pissa").apply(network := network_of(), base=slots(network))
    assert torch.equal(output(network), output(network_of()))


# Sums


def saved(folder: Path, name: str, seed: int, **arguments) -> Path:
    network, _ = adapted(name, seed, **arguments)
    save_adapter(network, folder, base=BASE | {"network": network.config}, process={}, autoencoder="a")
    return folder


def sum_of(weights: dict[Path, float]) -> nn.Module:
    network = network_of()
    apply_sum(network, read_terms(weights))
    return network.eval()


ADDED = ("full", "bitfit", "difffit", "norm", "lora", "rslora", "ia3", "shira", "fourierft", "waveft", "miss", "beft")


@pytest.mark.parametrize("name", ADDED)
def test_sums_are_of_changes_of_weights(tmp_path, name):
    a, b = (saved(tmp_path / key, name, seed) for key, seed in (("a", 3), ("b", 4)))
    base = network_of()
    assert torch.allclose(output(sum_of({a: 1, b: 0})), output(adapted(name, 3)[0]), atol=1e-5)
    alone, dial = sum_of({a: 0.7}), adapted(name, 3)[1].dial.at(0.7)
    assert torch.allclose(output(alone), output(dial), atol=1e-5)
    assert torch.allclose(output(sum_of({a: 0.5, b: -0.5})), output(sum_of({b: -0.5, a: 0.5})), atol=1e-5)
    network = sum_of({a: 0.7, b: 0.3})
    if name in ("lora", "rslora", "full", "shira", "fourierft", "waveft", "miss"):
        first, second = (merged(sum_of({path: 1})) for path in (a, b))
        both, plain = merged(network), dict(base.named_parameters())
        for key, weight in plain.items():
            expected = weight + 0.7 * (first[key] - weight) + 0.3 * (second[key] - weight)
            assert torch.allclose(both[key], expected, atol=1e-5), key
    else:
        assert torch.equal(output(network.adaptation.dial.at(0)), output(base))


def merged(network: nn.Module) -> dict[str, torch.Tensor]:
    network.adaptation.merge(network)
    return dict(network.named_parameters())


def test_an_adapter_less_itself_is_the_base(tmp_path):
    a, b = (saved(tmp_path / key, "difffit", 3) for key in ("a", "b"))
    assert torch.equal(output(sum_of({a: 1, b: -1})), output(network_of()))


def test_loras_of_two_ranks_add_up(tmp_path):
    a, b = saved(tmp_path / "a", "lora", 3, r=2, lora_alpha=4), saved(tmp_path / "b", "lora", 4, r=6, lora_alpha=3)
    network = sum_of({a: 2.0, b: -0.5})
    assert network.blocks[0].attn.qkv.lora_A["default"].weight.shape[0] == 8
    changes = [adapted("lora", seed, r=r, lora_alpha=s)[0] for seed, r, s in ((3, 2, 4), (4, 6, 3))]
    deltas = [n.blocks[0].attn.qkv.get_delta_weight("default") for n in (*changes, network)]
    assert torch.allclose(deltas[2], 2 * deltas[0] - 0.5 * deltas[1], atol=1e-5)


def test_what_cannot_be_added_up_is_refused(tmp_path):
    lora, difffit = saved(tmp_path / "lora", "lora", 3), saved(tmp_path / "difffit", "difffit", 3)
    for name in ("oft", "adaptformer", "dora", "vpt_deep", "loha"):
        with pytest.raises(UserError, match="no linear function"):
            sum_of({saved(tmp_path / name, name, 3): 1})
    with pytest.raises(UserError, match="other settings"):
        sum_of({lora: 1, difffit: 1})
    with pytest.raises(UserError, match="no adapter"):
        read_terms({})
    other = {"base": BASE | {"classes": "reinit"}}
    network, _ = adapted("bitfit")
    save_adapter(network, tmp_path / "new", process={}, autoencoder="a", **other)
    with pytest.raises(UserError, match="label table of its own"):
        read_terms({tmp_path / "new": 1})
    save_adapter(network, tmp_path / "far", base=BASE | {"sha256": "1"}, process={}, autoencoder="a")
    with pytest.raises(UserError, match="of one base"):
        read_terms({lora: 1, tmp_path / "far": 1})

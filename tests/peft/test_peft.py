"""What every method promises, on every network: what trains, how much of it, and what comes back from its files."""

import pytest
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close

from ditune.checkpoints import load_adapter, load_adapters, read_adapter, save_adapter
from ditune.commands.parameters import parameter_table
from ditune.errors import UserError
from ditune.networks import build_network
from ditune.peft import METHODS, MOE_METHODS, Full, build_peft, merge
from ditune.training import Ema
from helpers import ROOT, assert_same_bits
from peft_helpers import CASES, Trained, build_base, build_method, everything, output, train

# Trainable parameters of DiT-XL/2 on Food-101. The first six are the DiffFit paper's Table 1 to its digits
# (673.8M, 0.61M, 1.15M, 2.18M, 4.28M, 4.28M; 0.83M with affine norms); its VPT-Deep (2.81M) is not reproduced.
COUNTS = [
    ("full", {}, 673_799_072),
    ("bitfit", {}, 607_136),
    ("adaptformer", {}, 4_280_320),
    ("adapter", {}, 4_280_320),
    ("difffit", {"affine_norms": True}, 832_928),
    ("difffit", {}, 703_904),  # the public re-implementations
    ("difffit", {"gamma_depth": 28}, 800_672),
    ("difffit", {"gammas": ["qkv"]}, 607_136 + 14 * 3 * 1152),
    ("difffit", {"gammas": ["proj"]}, 607_136 + 14 * 1152),
    ("difffit", {"gammas": ["branches"]}, 607_136 + 14 * 2 * 1152),
    ("vpt_deep", {"num_prompts": 50}, 1_612_800 + 102 * 1152),
    ("vpt_shallow", {"num_prompts": 50}, 50 * 1152 + 102 * 1152),
    ("lora", {"r": 8}, 1_149_696),
    ("lora", {"r": 16}, 2_181_888),
    ("dora", {"r": 8}, 1_128_960 + 102 * 1152),
    ("pissa", {"r": 8}, 1_149_696),
    ("ia3", {}, 225_792 + 102 * 1152),
    ("oft", {"oft_block_size": 32}, 499_968 + 102 * 1152),
    ("vera", {"r": 256}, 103_936 + 102 * 1152),
    ("gralora", {"r": 8}, 1_149_696),  # as LoRA of its rank
    ("hira", {"r": 8}, 1_149_696),
    ("road", {}, 28 * 3456 + 102 * 1152),
    ("psoft", {}, 28 * (32 * 31 // 2 + 2 * 32) + 102 * 1152),
    ("beft", {}, 28 * 3456 + 102 * 1152),
    ("randlora", {}, 28 * 36 * (32 + 1152) + 102 * 1152),  # 36 products of rank 32
    ("peanut", {"r": 8}, 28 * 2 * 8 * 3456 + 102 * 1152),
    ("supertuning", {}, 28 * int(3456 * 1152 * (1 - 0.99)) + 102 * 1152),
    ("float", {}, 4 * 28 + 102 * 1152),
    ("float", {"granularity": "row"}, 28 * (3 + 1 + 4 + 1) * 1152 + 102 * 1152),
    ("norm", {}, 28 * 4 * 1152 + 102 * 1152),
    ("norm", {"adaln": True}, 28 * 4 * 1152 + 102 * 1152 + (28 * 6 + 2) * (1152 + 1) * 1152),
]


@pytest.mark.parametrize(("name", "arguments", "count"), COUNTS)
def test_parameters_that_train_of_xl_2_on_food101(name, arguments, count):
    with torch.device("meta"):
        network, method = build_network("dit_xl_2", num_classes=101), build_peft(name, lr=1e-3, **arguments)
        method.apply(network)
    assert sum(p.numel() for p in method.trainable(network).values()) == count


def test_table_of_the_docs():
    """Its first network is counted again; the last one has the counts above."""
    cfg = OmegaConf.load(ROOT / "configs" / "parameters.yaml")
    fresh = parameter_table(cfg.rows, ["dit_s_2"], cfg.num_classes, ROOT / "configs" / "peft").splitlines()
    docs = (ROOT / "docs" / "guide" / "peft.md").read_text().splitlines()
    shown = docs[docs.index("| method | " + " | ".join(cfg.networks) + " |") :][: len(fresh)]
    assert [line.split("|")[1:3] for line in shown] == [line.split("|")[1:3] for line in fresh]
    assert {row.split()[0] for row in cfg.rows} == set(METHODS)
    assert {path.stem for path in (ROOT / "configs" / "peft").glob("[!_]*.yaml")} == {*METHODS, *MOE_METHODS}


# The life of an adapter, one training for all tests of a method on a network


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request) -> tuple[str, str, Trained]:
    return *request.param, train(*request.param)


def test_it_starts_as_the_base(case):
    *_, trained = case
    if trained.method.starts_as_identity:
        assert_close(trained.start, trained.base, atol=1e-5, rtol=1e-5)
    else:
        assert (trained.start - trained.base).abs().max() > 1e-4


def test_only_what_it_declares_has_changed(case):
    *_, trained = case
    declared = trained.method.trainable(trained.network).keys()
    after = everything(trained.network)
    changed = {key for key, value in after.items() if not torch.equal(value, trained.before[key])}
    assert changed == declared
    assert ("y_embedder.embedding_table.weight" in declared) == trained.method.train_labels
    assert Ema(trained.method.trainable(trained.network), decay=0.9).average.keys() == declared


def test_it_trains_less_than_half(case):
    *_, trained = case
    if isinstance(trained.method, Full):
        pytest.skip("full fine-tuning trains everything")
    parameters = {key: p.numel() for key, p in trained.network.named_parameters()}
    assert sum(parameters[key] for key in trained.method.trainable(trained.network)) < 0.5 * sum(parameters.values())


def test_it_can_leave_the_labels_alone(case):
    network, name, _ = case
    base, method = build_base(network), build_method(name, train_labels=False)
    method.apply(base)
    assert not [key for key in method.trainable(base) if key.startswith("y_embedder.")]


def test_files_give_it_back(case, tmp_path):
    network, name, trained = case
    expected = output(trained.network)
    assert (expected - trained.base).abs().max() > 1e-3  # it has learnt something
    save_adapter(trained.network, tmp_path)
    _, tensors = read_adapter(tmp_path)
    size = sum(p.numel() for p in trained.method.trainable(trained.network).values())
    if name == "pissa":  # on the unchanged base it is a LoRA of twice the rank
        size += sum(p.numel() for key, p in trained.method.trainable(trained.network).items() if "lora" in key)
    assert sum(tensor.numel() for tensor in tensors.values()) == size
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * size + 150 * len(tensors) + 1000

    base = build_base(network)
    method = load_adapter(base, tmp_path)
    tolerance = 1e-5 if name == "pissa" else 0
    assert_close(output(base), expected, atol=tolerance, rtol=0)
    save_adapter(base, tmp_path / "again")
    assert_same_bits(read_adapter(tmp_path / "again")[1], tensors)

    if method.unmergeable:
        with pytest.raises(UserError, match="cannot be merged"):
            merge(base)
        assert_close(output(base), expected, atol=0, rtol=0)
    else:
        method.merge(base)
        assert base.state_dict().keys() == build_base(network).state_dict().keys()
        assert_close(output(base), expected, atol=1e-5, rtol=1e-5)
        assert base.adaptation is None


def test_it_is_switched_on_and_off_beside_others(case, tmp_path):
    network, name, trained = case
    save_adapter(trained.network, tmp_path / "own")
    for other in ("difffit", "lora"):
        base = build_base(network)
        build_method(other).apply(base)
        with torch.no_grad():
            base.y_embedder.embedding_table.weight += 1
        save_adapter(base, tmp_path / other)
    base = build_base(network)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    adapters = load_adapters(base, {folder: tmp_path / folder for folder in ("difffit", "own", "lora")})
    assert_close(output(base), trained.base, atol=0, rtol=0)
    with adapters.used("own") as network:
        own = output(network)
        with adapters.used("lora"):
            assert not torch.equal(output(base), own)
        assert torch.equal(output(base), own)
    assert_close(own, output(trained.network), atol=1e-5 if name == "pissa" else 0, rtol=0)
    assert_close(output(base), trained.base, atol=0, rtol=0)
    assert_same_bits(dict(base.state_dict()), before)

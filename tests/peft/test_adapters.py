"""Adapters as files: peft's format both ways, and everything that must not be loaded, or half loaded."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from ditune.checkpoints import load_adapter, load_adapters, load_network, save_adapter, save_network
from ditune.errors import UserError
from ditune.files.atomic import sha256
from ditune.networks import DiT
from ditune.peft import HUGGINGFACE, adapt_labels, build_peft, merge
from helpers import GOLDEN, assert_same_bits, golden
from peft_helpers import build_base, build_method, output, train


def golden_network() -> DiT:
    network = DiT(**json.loads((GOLDEN / "tiny_dit_config.json").read_text()))
    network.load_state_dict(golden("tiny_dit_weights"))
    return network


# huggingface peft's files


@pytest.mark.parametrize("name", ["peft_lora_r4_qkv", "peft_dora_r4_qkv_proj"])
def test_adapters_that_peft_wrote(name, tmp_path):
    expected = load_file(GOLDEN / name / "expected.safetensors")
    inputs = [expected[key] for key in "xty"]
    network = golden_network()
    load_adapter(network, GOLDEN / name)
    assert_close(network(*inputs), expected["out"], atol=2e-5, rtol=1e-5)
    save_adapter(network, tmp_path)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, GOLDEN / name))
    assert_same_bits(ours, theirs)
    merge(network)
    assert_close(network(*inputs), expected["out_merged"], atol=2e-5, rtol=1e-5)
    assert network.state_dict().keys() == golden_network().state_dict().keys()


@pytest.mark.parametrize("name", [*HUGGINGFACE, "adalora"])
def test_peft_reads_what_we_write_and_we_read_it_back(name, tmp_path):
    from peft import PeftModel

    trained = train("dit", name)
    expected = output(trained.network)
    save_adapter(trained.network, tmp_path / "ours", base={"file": "base.safetensors"})
    theirs = PeftModel.from_pretrained(build_base("dit"), tmp_path / "ours")
    assert_close(output(theirs), expected, atol=1e-5, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    if name == "shira":
        assert any("indices" in key for key in load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    network = build_base("dit")
    load_adapter(network, tmp_path / "theirs")
    assert_close(output(network), expected, atol=1e-5, rtol=0)


def test_random_matrices_that_a_file_brings(tmp_path):
    from peft import PeftModel, VeraConfig, get_peft_model

    config = VeraConfig(r=4, target_modules=["qkv"], projection_prng_key=5, d_initial=1.0)
    theirs = get_peft_model(build_base("dit"), config)
    theirs.base_model.vera_A["default"].mul_(2)  # not what the seed gives
    torch.nn.init.ones_(theirs.base_model.model.blocks[0].attn.qkv.vera_lambda_b["default"])
    theirs.save_pretrained(tmp_path / "theirs")
    network = build_base("dit")
    load_adapter(network, tmp_path / "theirs")
    assert_close(output(network), output(theirs), atol=1e-6, rtol=0)
    save_adapter(network, tmp_path / "ours")
    again = PeftModel.from_pretrained(build_base("dit"), tmp_path / "ours")
    assert_close(output(again), output(theirs), atol=1e-6, rtol=0)


def test_ranks_that_adalora_gave_up(tmp_path):
    trained = train("dit", "adalora")
    ranks = [int((p != 0).sum()) for name, p in trained.network.named_parameters() if "lora_E" in name]
    assert sum(ranks) == 2 * 8  # of 2 x 12
    state = trained.method.training_state()
    assert sum(map(sum, state["rank_pattern"].values())) == 2 * 8


def test_a_training_too_short_for_adalora_is_a_sentence():
    method = build_method("adalora")
    method.apply(build_base("dit"))
    method.config.total_step, method.config.tfinal = 1, 0
    with pytest.raises(UserError, match="Set max_steps to at least 2"):
        method.after_step(None, 1)


# What must not be loaded


@pytest.fixture
def saved(tmp_path) -> tuple[Path, Path]:
    """A base network's file and a folder with a DiffFit adapter of it."""
    save_network(tmp_path / "base.safetensors", build_base("dit"), {})
    network = load_network(tmp_path / "base.safetensors")
    build_method("difffit").apply(network)
    base = {"file": "base.safetensors", "sha256": sha256(tmp_path / "base.safetensors"), "network": network.config}
    save_adapter(network, tmp_path / "adapter", base=base, class_names=["cat", "dog", "eel"])
    return tmp_path / "base.safetensors", tmp_path / "adapter"


def refused(network: DiT, folder: Path, message: str) -> None:
    """Loading says why not, and the network is what it was."""
    state, before = {k: v.clone() for k, v in network.state_dict().items()}, output(network)
    for load in (load_adapter, lambda network, folder: load_adapters(network, {"one": folder})):
        with pytest.raises(UserError, match=message) as caught:
            load(network, folder)
        assert str(caught.value).endswith(".")
        assert_same_bits(dict(network.state_dict()), state)
        assert torch.equal(output(network), before)


def test_another_network_class_count_or_base(saved, tmp_path):
    path, folder = saved
    assert load_adapter(load_network(path), folder).title == "difffit"
    for change in ({"depth": 1}, {"num_classes": 4}):
        key, value = next(iter(change.items()))
        other = DiT(**(build_base("dit").config | change))
        with pytest.raises(UserError, match=rf"another network: {key} \d \(here {value}\)"):
            load_adapter(other, folder)
    save_network(tmp_path / "other.safetensors", DiT(**build_base("dit").config), {})
    refused(load_network(tmp_path / "other.safetensors"), folder, "another file than the base network")


def test_files_that_are_damaged(saved):
    path, folder = saved
    network, weights = load_network(path), folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    for damage in (content[: len(content) // 2], content[:4], b"", pickle.dumps({"a": 1})):
        weights.write_bytes(damage)
        refused(network, folder, "is damaged")
    tensors = load_file_of(content, weights)
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["content_sha256"]  # as in adapters of before; else the hash is the first to tell
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for change, message in (
        ({"blocks.0.gamma1": torch.ones(7)}, "of another shape blocks.0.gamma1"),
        ({"surprise": torch.ones(1)}, "unknown surprise"),
    ):
        save_file(tensors | change, weights)
        refused(network, folder, message)
    save_file({k: v for k, v in tensors.items() if k != "blocks.0.gamma1"}, weights)
    refused(network, folder, "missing blocks.0.gamma1")
    weights.unlink()
    refused(network, folder, "is missing")
    torch.save({"a": 1}, folder / "adapter_model.bin")
    refused(network, folder, "holds a pickle")


def load_file_of(content: bytes, path: Path) -> dict[str, torch.Tensor]:
    path.write_bytes(content)
    return load_file(path)


def test_configs_that_are_not_ours(saved):
    path, folder = saved
    network, file = load_network(path), folder / "adapter_config.json"
    config = json.loads(file.read_text())
    for change, message in (
        ({"format": "ditune-adapter-9"}, "format 'ditune-adapter-9'"),
        ({"peft": {"name": "difffit", "lr": 1, "size": 3}}, r"does not know.*size"),
        ({"peft": {"name": "diffit"}}, "no method.*diffit"),
        ({"peft_type": "NEXTLORA"}, "no method 'NEXTLORA'"),
    ):
        file.write_text(json.dumps(config | change))
        refused(network, folder, message)
    for text, message in (("{", "is damaged"), ("[]", "no JSON object")):
        file.write_text(text)
        refused(network, folder, message)


def test_peft_adapters_of_other_shapes(tmp_path):
    shutil.copytree(GOLDEN / "peft_lora_r4_qkv", tmp_path / "adapter")
    refused(build_base("dit"), tmp_path / "adapter", "does not fit this network")


# What cannot be applied


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("lora", {"r": 0}, "r` should be a positive integer"),
        ("adalora", {"init_r": 0, "target_r": -1, "total_step": 9}, "rank is 0"),
        ("adalora", {"init_r": 4, "target_r": 4, "total_step": 9}, "Set it below init_r=4"),
        ("vera", {"r": 0}, "peft cannot adapt"),
        ("oft", {"oft_block_size": 0}, "peft refuses these arguments"),
        ("lora", {"target_modules": r"blocks\.\d+\.attn\.query"}, "not found in the base model"),
        ("lora", {"target_modules": ["proj"]}, "x_embedder.proj, which the network never calls"),
        ("adaptformer", {"bottleneck": 0}, "at least 1"),
        ("vpt_deep", {"num_prompts": 0}, "at least 1"),
        ("difffit", {"gamma_depth": 3}, "Set 0 to 2"),
        ("difffit", {"gammas": ["fc1"]}, "Choose of qkv, proj, branches"),
    ],
)
def test_settings_that_cannot_work_leave_the_network_alone(name, arguments, message):
    network = build_base("dit")
    state, before = {k: v.clone() for k, v in network.state_dict().items()}, output(network)
    with pytest.raises(UserError, match=message):
        build_peft(name, lr=1e-3, **arguments).apply(network)
    assert_same_bits(dict(network.state_dict()), state)
    assert torch.equal(output(network), before)
    assert all(p.requires_grad for p in network.parameters())
    build_method("bitfit").apply(network)  # another one still can


def test_a_network_is_adapted_once():
    network = build_base("dit")
    build_method("bitfit").apply(network)
    with pytest.raises(UserError, match="adapted already"):
        build_method("difffit").apply(network)


def test_adapters_by_name(saved):
    path, folder = saved
    adapters = load_adapters(load_network(path), {"one": folder})
    with pytest.raises(UserError, match=r"no adapter 'two'\. Choose of one"):
        adapters.use("two")
    with pytest.raises(UserError, match="already"):
        adapters.add("one", build_method("bitfit"), {})


# New classes

OLD, NEW = ["cat", "dog", "eel"], ["eel", "fox", "cat", "gnu"]


@pytest.mark.parametrize("way", ["reinit", "mean", "map"])
def test_label_tables_of_more_classes(way):
    network = build_base("dit")
    old = network.y_embedder.embedding_table.weight.clone()
    adapt_labels(network, way, NEW, OLD)
    new = network.y_embedder.embedding_table.weight
    assert new.shape == (5, 32)
    assert torch.equal(new[4], old[3])  # the null class
    assert network.num_classes == network.config["num_classes"] == 4
    mean = old[:3].mean(dim=0)
    if way == "reinit":
        assert 0.01 < new[:4].std() < 0.03
    elif way == "mean":
        assert torch.equal(new[:4], mean.expand(4, -1))
    else:
        assert torch.equal(new[:4], torch.stack([old[2], mean, old[0], mean]))


def test_label_table_of_fewer_classes():
    network = build_base("dit")
    old = network.y_embedder.embedding_table.weight.clone()
    adapt_labels(network, "reuse", 2)
    assert torch.equal(network.y_embedder.embedding_table.weight, old[[0, 1, 3]])


@pytest.mark.parametrize(
    ("way", "new", "message"),
    [
        ("reuse", 4, "at least 4 classes"),
        ("map", 4, "needs the names"),
        ("map", ["ape", "gnu"], "no class name that the base knows"),
        ("copy", 4, "Choose one of reinit, reuse, mean, map"),
    ],
)
def test_label_tables_that_cannot_be(way, new, message):
    network = build_base("dit")
    with pytest.raises(UserError, match=message):
        adapt_labels(network, way, new, OLD)
    assert network.num_classes == 3


@pytest.mark.parametrize("name", ["difffit", "lora"])
def test_adapters_bring_their_classes(name, tmp_path):
    save_network(tmp_path / "base.safetensors", build_base("dit"), {})
    network = load_network(tmp_path / "base.safetensors")
    base = {"file": "base.safetensors", "sha256": sha256(tmp_path / "base.safetensors"), "network": network.config}
    adapt_labels(network, "mean", NEW)
    build_method(name).apply(network)
    save_adapter(network, tmp_path / "adapter", base=base)
    again = load_network(tmp_path / "base.safetensors")
    adapters = load_adapters(again, {"new": tmp_path / "adapter"})
    with adapters.used("new"):
        assert again.num_classes == 4
        assert torch.equal(output(again), output(network))
    assert again.num_classes == 3
    load_adapter(load_network(tmp_path / "base.safetensors"), tmp_path / "adapter")

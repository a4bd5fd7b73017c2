"""Foreign checkpoints: precisions, names, containers, and messages for files that are no networks."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from ditune.checkpoints import load_network, read_network
from ditune.commands.train import train
from ditune.errors import UserError
from ditune.networks.embeddings import sincos_2d
from foreign_files import Settings, assert_read, network

# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("back", [False, True])
def test_other_precisions_are_read_into_fp32(saved, tensors, dtype, back):
    """And fp32 files whose values have been through another one."""
    halved = {key: value.to(dtype) for key, value in tensors.items()}
    path = saved({key: value.float() for key, value in halved.items()} if back else halved)
    assert_read(path, halved)
    assert {p.dtype for p in load_network(path).parameters()} == {torch.float32}


def test_an_averaged_position_table_is_the_same_table(saved, tensors):
    """DiT's training code averages it too, and every step rounds."""
    average = tensors["pos_embed"].clone()
    for _ in range(20_000):
        average.mul_(0.9999).add_(tensors["pos_embed"], alpha=1e-4)
    assert (average - tensors["pos_embed"]).abs().max() > 1e-4
    assert_read(saved(tensors | {"pos_embed": average}), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("change", ["shifted", "scaled", "swapped"])
def test_other_position_tables_are_refused_in_any_precision(saved, tensors, dtype, change):
    table = tensors["pos_embed"]
    table = {
        "shifted": table + 0.01,
        "scaled": sincos_2d(384, 4, 0.5).float()[None],
        "swapped": table.roll(192, dims=2),
    }[change]
    with pytest.raises(UserError, match="pos_embed"):
        load_network(saved({k: v.to(dtype) for k, v in (tensors | {"pos_embed": table}).items()}))


def test_quantised_weights_are_refused(saved, tensors):
    path = saved(tensors | {"x_embedder.proj.bias": torch.zeros(384, dtype=torch.int8)})
    with pytest.raises(UserError, match="before its quantisation"):
        load_network(path)


# Names

PREFIXES = ["module.", "_orig_mod.", "module._orig_mod.", "model.", "network.", "net.", "ema_model.", "dit."]
PREFIXES += ["model.diffusion_model.", "model.module._orig_mod."]
CONTAINERS = ["", "ema", "model_ema", "ema_state_dict", "model", "state_dict", "net", "module", "state_dict/model"]


def wrapped(tensors: dict, container: str) -> dict:
    for name in reversed(container.split("/") if container else []):
        tensors = {name: tensors, "epoch": 3}
    return tensors


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_taken_off(saved, tensors, prefix):
    named = {prefix + key: value for key, value in tensors.items()}
    assert_read(saved({"state_dict": named | {"loss.weight": torch.ones(1)}, "epoch": 1}, "lightning.ckpt"), tensors)


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers_are_opened(saved, tensors, container):
    assert_read(saved(wrapped({f"module.{key}": value for key, value in tensors.items()}, container)), tensors)


def test_wrappers_inside_of_names(saved, tensors):
    def inner(key: str) -> str:
        return key.replace("blocks.0.", "blocks.0._orig_mod.").replace(
            "embedder.", "embedder._checkpoint_wrapped_module."
        )

    assert_read(saved({inner(key): value for key, value in tensors.items()}), tensors)


@pytest.mark.parametrize("empty", [None, {}, 0])
def test_an_empty_average_is_passed_over(saved, tensors, empty):
    assert_read(saved({"ema": empty, "model": tensors}), tensors)


def test_averages_go_first(saved, tensors):
    other = {key: value + 1 for key, value in tensors.items()}
    assert_read(saved({"state_dict": other, "state_dict_ema": tensors}), tensors)
    names = {f"online_model.{key}": value for key, value in other.items()}
    names |= {f"ema_model.{key}": value for key, value in tensors.items()} | {"step": torch.ones(1)}
    assert_read(saved(names), tensors)
    # torch.optim.swa_utils.AveragedModel
    averaged = {f"module.{key}": value for key, value in tensors.items()} | {"n_averaged": torch.tensor(3)}
    assert_read(saved(averaged), tensors)


def test_several_networks_and_lists_without_names_are_refused(saved, tensors):
    with pytest.raises(UserError, match="several networks: 'teacher', 'student'"):
        load_network(saved({"teacher": tensors, "student": tensors}))
    with pytest.raises(UserError, match=r"without names, 'ema\.shadow_params'"):
        load_network(saved({"ema": {"decay": 0.9, "shadow_params": list(tensors.values())}, "model": tensors}))


@pytest.mark.parametrize("name", ["renamed.sft", "weights.bin", "weights.pt", "weights"])
def test_safetensors_are_told_by_their_first_bytes(tmp_path, tensors, name):
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / name)
    assert_read(tmp_path / name, tensors)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.ckpt", "weights"])
def test_torch_files_are_told_by_their_first_bytes(saved, tensors, name):
    assert_read(saved(tensors, name), tensors)


@pytest.mark.parametrize("protocol", [2, 4])
def test_numpy_arrays_are_weights_too(saved, tensors, protocol):
    arrays = {key: value.numpy() for key, value in tensors.items()}
    arrays["x_embedder.proj.weight"] = np.asfortranarray(arrays["x_embedder.proj.weight"])
    arrays["x_embedder.proj.bias"] = arrays["x_embedder.proj.bias"].astype(">f4")
    assert_read(saved({"model": arrays}, pickle_protocol=protocol), tensors)


def test_parameters_and_shared_storages_are_read_beside_strangers(saved, tensors):
    both = torch.stack([tensors["blocks.0.mlp.fc1.bias"]] * 2)
    changed = tensors | {
        "blocks.0.mlp.fc1.bias": both[1],
        "final_layer.linear.bias": torch.nn.Parameter(torch.ones(32)),
    }
    changed["blocks.0.mlp.fc1.weight"] = tensors["blocks.0.mlp.fc1.weight"].T.contiguous().T
    assert_read(saved({"ema": changed, "config": Settings()}), changed)


# What is none


def test_what_was_found_is_said(tmp_path, saved):
    with pytest.raises(UserError, match=r"a torch file with the keys weights \(2, 3\), more \{a, b\}, epoch\. "):
        load_network(saved({"weights": torch.ones(2, 3), "more": {"a": 1, "b": 2}, "epoch": 3}))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"a folder with notes\.txt"):
        load_network(tmp_path / "folder")
    with pytest.raises(
        UserError, match=r"the keys model \(ditune\.networks\.dit\.DiT\)\..*Save the network's state_dict"
    ):
        load_network(saved({"model": network()}))
    with pytest.raises(UserError, match=r"one object, ditune\.networks\.dit\.DiT,.*nothing was executed"):
        load_network(saved(network()))
    for content, message in (
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (b"<!DOCTYPE html>", "web page"),
        (b"\x00" * 64, "first bytes"),
    ):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_network(tmp_path / "x.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "script.pt")
    with pytest.raises(UserError, match="TorchScript"):
        load_network(tmp_path / "script.pt")
    np.savez(tmp_path / "arrays.npz", a=np.ones(1))
    with pytest.raises(UserError, match="zip archive"):
        load_network(tmp_path / "arrays.npz")


def test_truncated_files_are_damaged(saved, tensors):
    for legacy in (False, True):
        path = saved(tensors, _use_new_zipfile_serialization=not legacy)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(UserError, match="is damaged"):
            load_network(path)


def test_runs_adapters_and_checkpoints_of_ours_name_what_to_give(small, base, tmp_path):
    cfg = small(f"pretrained={base}", "peft=difffit", "max_steps=1", "callbacks.checkpoint.every_n_steps=1")
    assert train(cfg) == 0
    run = tmp_path / "run"
    OmegaConf.save(cfg, run / "config.yaml")
    newest = next((run / "checkpoints").glob("*.ckpt"))
    for path, message in (
        (run, f"is a run folder. Give run={run}"),
        (run / "adapter", f"is an adapter.*Give run={run}"),
        (run / "adapter" / "adapter_model.safetensors", "is an adapter"),
        (newest, f"resume a training from.*Give run={run}"),
    ):
        with pytest.raises(UserError, match=message):
            load_network(path)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "network.safetensors").write_bytes(base.read_bytes())
    with pytest.raises(UserError, match=r"Give .*export/network\.safetensors"):
        load_network(tmp_path / "export")


def test_ours_is_ours_whatever_its_ending(base, tmp_path):
    (tmp_path / "base.pt").write_bytes(base.read_bytes())
    read = read_network(tmp_path / "base.pt")
    assert read.header["provenance"]["resolution"] == 16
    with pytest.raises(UserError, match="process=null"):
        read_network(base, "sit")

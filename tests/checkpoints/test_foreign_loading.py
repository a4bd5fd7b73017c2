"""Checkpoints of others as they really come: with bystanders, halved, wrapped, in parts, and of processes they hide."""

import argparse
import copy
import json
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from omegaconf import OmegaConf
from safetensors.torch import save_file

from ditune.autoencoders import KL
from ditune.checkpoints import load_network, networks, read_network, save_network
from ditune.checkpoints.diffusers_dit import to_theirs
from ditune.checkpoints.networks import PROCESSES
from ditune.commands.train import train
from ditune.config.base_network import build_network
from ditune.config.instantiate import instantiate
from ditune.config.options import load_option
from ditune.errors import UserError
from ditune.files import atomic as checkpoint_files
from ditune.files.atomic import sha256
from ditune.networks import DiT, dit, dit_moe
from ditune.networks.embeddings import sincos_2d
from ditune.processes import FlowProcess, GaussianProcess, build_process
from ditune.run import load_checkpoint, load_run
from helpers import ROOT, SMALL_FLOW, compose

SHAPE = {"input_size": 8, "hidden_size": 384, "depth": 1, "num_heads": 6, "num_classes": 3}
NONE = OmegaConf.create({"_target_": "ditune.autoencoders.Pixels"})


def network(**changes: object) -> DiT:
    torch.manual_seed(0)
    made = DiT(**(SHAPE | changes))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return made


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return dict(network().state_dict())


@pytest.fixture
def saved(tmp_path):
    """`saved(content, **options)`: path of a torch file."""

    def write(content: object, name: str = "0050000.pt", **options: object) -> Path:
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return write


def assert_read(path: Path, tensors: dict[str, torch.Tensor], **overrides: object) -> None:
    loaded = load_network(path, **overrides).state_dict()
    assert all(torch.equal(loaded[key], value.float()) for key, value in tensors.items() if key != "pos_embed")


# Bystanders


class Attack:
    """Would make a file at `path`, by the shell."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Settings(dict):
    """A config object of another code."""

    def __setstate__(self, state: object) -> None:
        raise AssertionError("it was called")


class Rare(list):
    pass


def arguments(**more: object) -> argparse.Namespace:
    return argparse.Namespace(model="DiT-S/2", epochs=1400, global_batch_size=256, vae="ema", ckpt=None, **more)


def optimizer() -> dict:
    return {"state": {0: {"step": 7, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}


@pytest.mark.parametrize("legacy", [False, True])
def test_the_layout_of_dits_own_training_code(saved, tensors, legacy):
    other = {key: value + 1 for key, value in tensors.items()}
    content = {"model": other, "ema": tensors, "opt": optimizer(), "args": arguments()}
    assert_read(saved(content, _use_new_zipfile_serialization=not legacy), tensors)


def bystanders() -> dict[str, object]:
    generator = np.random.default_rng(0)
    return {
        "config": Settings(lr=1e-4, nested=Settings(a=[1])),
        "hyper_parameters": OmegaConf.create({"model": {"depth": 1}, "list": [1, 2]}),
        "counts": defaultdict(list, a=[1]),
        "path": Path("logs"),
        "rare": Rare([1, 2]),
        "numpy_rng": ("MT19937", generator.integers(0, 9, 624), 624, 0, 0.0),
        "score": np.float64(generator.random()),
        "table": generator.random((2, 3)),
        "scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], lr=0.1), 1),
        "dtype": torch.bfloat16,
        "rng": torch.get_rng_state(),
        "class": argparse.ArgumentParser,
    }


@pytest.mark.parametrize("name", bystanders())
@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_of_other_codes_are_passed_over(saved, tensors, name, protocol):
    content = {"ema": tensors, "args": arguments(), name: bystanders()[name]}
    assert_read(saved(content, pickle_protocol=protocol), tensors)


@pytest.mark.parametrize("container", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize(
    "where", ["beside", "nested in args", "instead of a tensor", "as a key's value of the weights"]
)
def test_nothing_in_a_pickle_is_executed(tmp_path, saved, tensors, container, where):
    attack = Attack(tmp_path / "executed")
    content = {"ema": dict(tensors), "args": arguments()}
    if where == "beside":
        content["opt"] = [attack]
    elif where == "nested in args":
        content["args"].path = {"deep": attack}
    elif where == "instead of a tensor":
        content["ema"]["x_embedder.proj.weight"] = attack
    else:
        content["ema"]["x_embedder.proj.bias"] = attack
    path = saved(content, _use_new_zipfile_serialization=container == "zip")
    if container == "pickle":
        path.write_bytes(pickle.dumps({"train_state": {"params_ema": {}, "opt_state": attack}}))
    if container == "zip" and where in ("beside", "nested in args"):
        assert_read(path, tensors)
    else:
        with pytest.raises(UserError) as caught:
            load_network(path)
        assert "weights_only" not in str(caught.value)
        assert "etch it again" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "attack",
    [
        b"c__builtin__\nexec\n(S'import pathlib; pathlib.Path(\"executed\").touch()'\ntR.",
        b"cos\nsystem\n(S'touch executed'\ntR.",
        b"(S'touch executed'\nios\nsystem\n.",
        b"ccollections\nOrderedDict\n(N}S'__reduce__'\ncos\nsystem\nstb.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0etouch executed\x85R.",
        b"cbuiltins\ngetattr\n(cos\nS'system'\ntR(S'touch executed'\ntR.",
    ],
)
def test_hand_made_pickles_are_not_executed(tmp_path, saved, tensors, attack, monkeypatch):
    """Opcodes that no pickler writes, in the place of a torch file's object."""
    monkeypatch.chdir(tmp_path)
    source = saved({"ema": tensors})
    with zipfile.ZipFile(source) as old, zipfile.ZipFile("evil.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, attack if name.endswith("data.pkl") else old.read(name))
    with pytest.raises(UserError, match=r"no kind that is known|is damaged"):
        load_network("evil.pt")
    assert not Path("executed").exists()
    assert OrderedDict().__reduce__ is not os.system


class Beyond:
    """A tensor of more numbers than its storage has."""

    def __reduce__(self):
        storage = torch.ones(4).storage()
        return torch._utils._rebuild_tensor_v2, (storage, 0, (4000, 4000), (4000, 1), False, OrderedDict())


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_tensors_cannot_reach_beyond_their_bytes(saved, tensors):
    content = {"ema": tensors | {"x_embedder.proj.bias": Beyond()}}
    for more in ({}, {"config": Settings()}):
        path = saved(content | more)
        with pytest.raises(UserError, match="damaged"):
            load_network(path)


def test_strangers_are_named_in_the_log(saved, tensors, caplog):
    load_network(saved({"ema": tensors, "config": Settings()}))
    assert "Settings; they were passed over, nothing was executed" in caplog.text


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


# Parts and variants


def parts(folder: Path, tensors: dict, stem: str, end: str, index: str, variant: str = "") -> None:
    """Two files and their index."""
    names, keys = [f"{stem}{variant}-0000{k}-of-00002.{end}" for k in (1, 2)], sorted(tensors)
    weight_map = {key: names[i % 2] for i, key in enumerate(keys)}
    for name in names:
        part = {key: tensors[key].contiguous() for key in keys if weight_map[key] == name}
        (save_file if end == "safetensors" else torch.save)(part, folder / name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_official_keys_in_parts(tmp_path, tensors, end):
    index = f"model.{end}.index.json"
    parts(tmp_path, tensors, "model", end, index)
    assert_read(tmp_path, tensors)
    assert_read(tmp_path / index, tensors)
    (tmp_path / f"model-00002-of-00002.{end}").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.\w+, and they are not there"):
        load_network(tmp_path)


STEM = "diffusion_pytorch_model"


@pytest.fixture
def diffusers_folder(tmp_path):
    folder = tmp_path / "transformer"
    folder.mkdir()
    config = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 6, "attention_head_dim": 64}
    config |= {"in_channels": 4, "out_channels": 8, "num_layers": 1, "sample_size": 8, "patch_size": 2}
    (folder / "config.json").write_text(json.dumps(config | {"num_embeds_ada_norm": 3, "norm_type": "ada_norm_zero"}))
    return folder


@pytest.mark.parametrize(
    ("index", "variant", "end"),
    [
        (f"{STEM}.safetensors.index.json", "", "safetensors"),
        (f"{STEM}.safetensors.index.fp16.json", ".fp16", "safetensors"),
        (f"{STEM}.fp16.safetensors.index.json", "", "safetensors"),
        (f"{STEM}.safetensors.fp16.index.json", ".fp16", "safetensors"),
        (f"{STEM}.bin.index.json", "", "bin"),
        (f"{STEM}.bin.index.bf16.json", ".bf16", "bin"),
    ],
)
def test_diffusers_in_parts(diffusers_folder, tensors, index, variant, end):
    parts(diffusers_folder, to_theirs(tensors), STEM, end, index, variant)
    assert_read(diffusers_folder, tensors)


def test_diffusers_variants(diffusers_folder, tensors):
    theirs = {key: value.contiguous() for key, value in to_theirs(tensors).items()}
    with pytest.raises(UserError, match=r"has no diffusion_pytorch_model\.safetensors.*It holds config\.json\. "):
        load_network(diffusers_folder)
    halved = {key: value.half() for key, value in theirs.items()}
    save_file(halved, diffusers_folder / f"{STEM}.fp16.safetensors")
    assert_read(diffusers_folder, {key: value.half() for key, value in tensors.items()})
    assert_read(diffusers_folder.parent, {key: value.half() for key, value in tensors.items()})
    torch.save(theirs, diffusers_folder / f"{STEM}.bin")  # the plain one wins
    assert_read(diffusers_folder, tensors)
    with pytest.raises(UserError, match="one file of diffusers' DiT"):
        load_network(diffusers_folder / f"{STEM}.fp16.safetensors")


# Widths and heads


@pytest.mark.parametrize(("hidden", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_a_new_size_of_ours_changes_no_foreign_file(saved, monkeypatch, hidden, heads):
    monkeypatch.setitem(dit.SIZES, "dit_h", (hidden, 40, heads + 2 if hidden == 1152 else 2 * heads))
    monkeypatch.setitem(dit_moe.SIZES, "dit_moe_h", (hidden, 40, 2, 4, 1, False))
    path = saved(network(hidden_size=hidden, num_heads=heads).state_dict())
    assert load_network(path).config["num_heads"] == heads


def test_widths_of_nobody_take_their_heads_from_the_caller(saved):
    own = network(hidden_size=100, num_heads=5, mlp_ratio=2.67)
    path = saved(own.state_dict())
    with pytest.raises(UserError, match=r"size 100.*network_overrides\.num_heads="):
        load_network(path)
    loaded = load_network(path, num_heads=5)
    assert loaded.config["num_heads"] == 5
    assert loaded.blocks[0].mlp.fc1.out_features == 267
    assert load_network(path, own.config).config["num_heads"] == 5  # what is known of it
    published = saved(network().state_dict(), "published.pt")
    assert load_network(published, {"num_heads": 12}).config["num_heads"] == 6
    assert load_network(published, num_heads=12).config["num_heads"] == 12


def test_label_tables_without_a_null_class(saved):
    path = saved(network(class_dropout_prob=0.0).state_dict())
    assert load_network(path).num_classes == 2  # as in every published file
    assert load_network(path, num_classes=3).config["class_dropout_prob"] == 0
    assert load_network(path, class_dropout_prob=0.0).num_classes == 3


# Processes


def stored_process(path: Path, **options: object) -> dict:
    return read_network(path, **options).process


def test_the_guess_is_said_at_every_use(saved, tensors, caplog):
    caplog.set_level("INFO")
    path = saved({"ema": {key: value.half() for key, value in tensors.items()}})
    assert stored_process(path) == {}
    assert (
        f"read {path}: official DiT, hidden 384, depth 1, 6 heads, 3 classes + null class, epsilon diffusion "
        "(assumed), from 'ema', fp16" in caplog.text
    )
    assert "read as DiT's epsilon diffusion, since the file does not say; for a SiT file set process=sit" in caplog.text
    caplog.clear()
    assert stored_process(path, process="diffusion", key="pretrained_process") == {}
    assert "(by pretrained_process=)" in caplog.text
    assert "since the file does not say" not in caplog.text
    with pytest.raises(UserError, match="Choose one of diffusion, sit, repa"):
        read_network(path, "flow")


@pytest.mark.parametrize(("name", "key"), [("SiT-XL-2-256x256.pt", "sit"), ("last_repa.pt", "repa")])
def test_names_that_speak_against_the_guess(saved, tensors, caplog, name, key):
    read_network(saved(tensors, name))
    assert f"set process={key}" in caplog.text
    assert "WARNING" in caplog.text


@pytest.mark.parametrize(
    ("args", "data_at"),
    [
        (arguments(path_type="Linear", prediction="velocity"), 1),
        (arguments(path_type="linear", prediction="v", enc_type="dinov2-vit-b"), 0),
    ],
)
def test_arguments_in_the_file_say_the_process(saved, tensors, args, data_at):
    process = stored_process(saved({"ema": tensors, "args": args}))
    assert (process["kind"], process["data_at"], process["time_scale"]) == ("flow", data_at, 1.0)
    args.path_type = "GVP"
    path = saved({"ema": tensors, "args": args})
    with pytest.raises(UserError, match="path gvp"):
        read_network(path)
    assert read_network(path, "sit").process["data_at"] == 1


def test_projectors_are_repas_and_not_of_the_network(saved, tensors):
    path = saved({"ema": tensors | {"projectors.0.0.weight": torch.ones(2, 384)}})
    assert stored_process(path)["data_at"] == 0
    assert_read(path, tensors)


def test_sit_and_repa_are_asked_as_their_codes_do(saved):
    """SiT: x_t = t data + (1 - t) noise, v = data - noise. REPA: x_t = (1 - t) data + t noise, v = noise - data."""
    told = []

    def perfect(x, t, y):
        told.append(t.item())
        data, noise = torch.zeros_like(x), x / time
        return torch.cat([data - noise if sit else noise - data, x], dim=1)

    time = 0.25  # here: 0 = data
    for sit in (True, False):
        process = build_process(PROCESSES["sit" if sit else "repa"])
        x = torch.full((1, 4, 2, 2), 3.0)
        velocity = process.velocity(perfect, x, torch.tensor([time]), torch.zeros(1))
        torch.testing.assert_close(velocity, x / time)
    assert told == [0.75, 0.25]


def test_a_checkpoint_is_drawn_from_by_its_process(saved):
    path = saved(network(in_channels=3, learn_sigma=False).state_dict())
    sampler = load_option(ROOT / "configs" / "sampler" / "published.yaml")
    trained = load_checkpoint(path, NONE, sampler, False, "repa", {"num_heads": None})
    assert isinstance(trained.drawer.process, FlowProcess)
    assert type(trained.drawer.sampler).__name__ == "Euler"
    trained = load_checkpoint(path, NONE, sampler, False)
    assert trained.drawer.process.config["variance"] == "fixed_large"
    own = OmegaConf.create({"kind": "flow", "time_scale": 1000.0})
    assert load_checkpoint(path, NONE, sampler, False, own).drawer.process.time_scale == 1000
    unknown = OmegaConf.create({"kind": "flow", "speed": 1})
    with pytest.raises(UserError, match="process is no process"):
        load_checkpoint(path, NONE, sampler, False, unknown)


def test_training_on_a_flow_of_others(saved, pictures, tmp_path):
    """Its velocities are taken as they are; without the key it would be read as a diffusion, and converted."""
    path = saved(network(input_size=16, in_channels=3, learn_sigma=False).state_dict())
    general = [*SMALL_FLOW, f"data.root={pictures}", f"pretrained={path}", "network=as_pretrained"]

    def built(*overrides: str):
        cfg = compose(tmp_path / "run", *general, *overrides)
        objective = instantiate(cfg.objective, "objective")
        codec = instantiate(cfg.autoencoder, "autoencoder")
        build_network(cfg, ["cat", "dog", "eel"], codec, objective)
        return objective.process

    assert built().diffused is not None
    assert built("pretrained_process=diffusion").diffused is not None
    with pytest.raises(UserError, match=r"objective\.process\.time_scale=1\.0 objective\.process\.data_at=1"):
        built("pretrained_process=sit")
    process = built("pretrained_process=sit", "objective.process.time_scale=1", "objective.process.data_at=1")
    assert process.diffused is None


def test_a_run_on_a_flow_of_an_unpublished_width(saved, pictures, tmp_path):
    own = network(input_size=16, in_channels=3, learn_sigma=False, hidden_size=96, num_heads=3)
    path = saved({"ema": own.state_dict(), "args": arguments(), "config": Settings()})
    overrides = [*SMALL_FLOW, f"data.root={pictures}", f"pretrained={path}", "pretrained_process=repa", "peft=difffit"]
    overrides += ["network=as_pretrained", "+network.num_heads=3", "objective.process.time_scale=1.0", "max_steps=1"]
    cfg = compose(tmp_path / "run", *overrides, f"paths.cache_dir={tmp_path}/cache")
    assert train(cfg) == 0
    run = load_run(tmp_path / "run")
    assert run.network.config["num_heads"] == 3
    assert (run.drawer.process.time_scale, run.drawer.process.diffused) == (1.0, None)


COSINE = GaussianProcess("cosine").tables["betas"].tolist()


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, "v"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}, "epsilon"),
        (
            {"_class_name": "DDIMScheduler", "trained_betas": COSINE},
            "epsilon",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, None),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}, None),
    ],
)
def test_a_pipelines_scheduler_says_the_process(diffusers_folder, tensors, scheduler, expected):
    save_file({k: v.contiguous() for k, v in to_theirs(tensors).items()}, diffusers_folder / f"{STEM}.safetensors")
    path = diffusers_folder.parent / "scheduler" / "scheduler_config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(scheduler))
    if expected is None:
        with pytest.raises(UserError, match="of no diffusion that is known"):
            read_network(diffusers_folder.parent)
        assert read_network(diffusers_folder.parent, "sit").process["data_at"] == 1
        return
    process = build_process(read_network(diffusers_folder.parent).process).config
    assert process["prediction"] == expected
    assert process["schedule"] == ("cosine" if "trained_betas" in scheduler else "linear")


# Reading once, and in sight


def test_large_files_show_their_progress(saved, tensors, monkeypatch, tmp_path):
    meters = []

    class Recorded:
        def __init__(self, what: str, total: int, unit: str) -> None:
            self.what, self.total, self.done = what, total, 0
            meters.append(self)

        def __enter__(self) -> "Recorded":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def advance(self, count: int) -> None:
            self.done += count

    path = saved(tensors)
    for module in (checkpoint_files, networks):
        monkeypatch.setattr(module, "meter", Recorded)
        monkeypatch.setattr(module, "LARGE", 1000)
    load_network(path)
    hashed = sha256(path)
    assert [m.what for m in meters] == [f"reading {path.name}", f"hashing {path.name}"]
    assert meters[0].done == meters[0].total - tensors["pos_embed"].nbytes
    assert meters[1].done == meters[1].total == path.stat().st_size
    assert sha256(path) == hashed
    assert len(meters) == 2  # the second time it is known


def test_files_of_ours_are_read_as_before(base, tmp_path):
    one, two = load_network(base), read_network(base).network
    again = tmp_path / "again.safetensors"
    save_network(again, one, {"kind": "flow"})
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key])
        assert torch.equal(value, load_network(again).state_dict()[key])
    assert SimpleNamespace(**read_network(again).process).kind == "flow"


def test_a_halved_autoencoder_and_one_in_parts(tmp_path):
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, layers_per_block=1)
    ways = {
        "fp16": {"variant": "fp16"},
        "parts": {"max_shard_size": "8KB"},
        "fp16_parts": {"variant": "fp16", "max_shard_size": "8KB"},
        "bin_parts": {"safe_serialization": False, "max_shard_size": "8KB"},
    }
    for name, options in ways.items():
        halved = copy.deepcopy(vae).half() if "fp16" in name else vae
        halved.save_pretrained(tmp_path / name, **options)
        codec = KL(name, tmp_path / name)
        for key, value in halved.state_dict().items():
            assert torch.equal(codec.vae.state_dict()[key], value.float()), (name, key)
    for file in (tmp_path / "fp16").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match=r"it holds config\.json"):
        KL("empty", tmp_path / "fp16")

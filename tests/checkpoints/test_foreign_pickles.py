"""Foreign torch files with objects beside the tensors: the objects are passed over, and nothing is executed."""

import argparse
import os
import pickle
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from ditune.checkpoints import load_network
from ditune.errors import UserError
from foreign_files import Settings, arguments, assert_read


class Attack:
    """Would make a file at `path`, by the shell."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Rare(list):
    pass


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

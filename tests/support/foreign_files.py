"""A small DiT, and the files of others that hold it."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ditune.checkpoints import load_network
from ditune.networks import DiT

SHAPE = {"input_size": 8, "hidden_size": 384, "depth": 1, "num_heads": 6, "num_classes": 3}
STEM = "diffusion_pytorch_model"


def network(**changes: object) -> DiT:
    """A small DiT whose parameters all have values."""
    torch.manual_seed(0)
    made = DiT(**(SHAPE | changes))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return made


def assert_read(path: Path, tensors: dict[str, torch.Tensor], **overrides: object) -> None:
    """The file is read as the network of these tensors, in fp32."""
    loaded = load_network(path, **overrides).state_dict()
    assert all(torch.equal(loaded[key], value.float()) for key, value in tensors.items() if key != "pos_embed")


def parts(folder: Path, tensors: dict, stem: str, end: str, index: str, variant: str = "") -> None:
    """Two files and their index."""
    names, keys = [f"{stem}{variant}-0000{k}-of-00002.{end}" for k in (1, 2)], sorted(tensors)
    weight_map = {key: names[i % 2] for i, key in enumerate(keys)}
    for name in names:
        part = {key: tensors[key].contiguous() for key in keys if weight_map[key] == name}
        (save_file if end == "safetensors" else torch.save)(part, folder / name)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


class Settings(dict):
    """A config object of another code."""

    def __setstate__(self, state: object) -> None:
        raise AssertionError("it was called")


def arguments(**more: object) -> argparse.Namespace:
    return argparse.Namespace(model="DiT-S/2", epochs=1400, global_batch_size=256, vae="ema", ckpt=None, **more)

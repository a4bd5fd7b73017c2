"""Fixtures of foreign checkpoints."""

import json
from pathlib import Path

import pytest
import torch

from foreign_files import network


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """State dict of a small DiT."""
    return dict(network().state_dict())


@pytest.fixture
def saved(tmp_path):
    """`saved(content, **options)`: path of a torch file."""

    def write(content: object, name: str = "0050000.pt", **options: object) -> Path:
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return write


@pytest.fixture
def diffusers_folder(tmp_path):
    """Folder of a pipeline's transformer with its config, without weights."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    config = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 6, "attention_head_dim": 64}
    config |= {"in_channels": 4, "out_channels": 8, "num_layers": 1, "sample_size": 8, "patch_size": 2}
    (folder / "config.json").write_text(json.dumps(config | {"num_embeds_ada_norm": 3, "norm_type": "ada_norm_zero"}))
    return folder

"""Weights in the formats of others: recognised by what is in them, read to the bit, never executed."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ditune.checkpoints import load_network
from ditune.checkpoints.diffusers_dit import to_ours, to_theirs
from ditune.checkpoints.source import Source
from ditune.errors import UserError
from ditune.networks import DiT, build_network
from helpers import GOLDEN, composed, golden

OFFICIAL = {
    "DiT-S-2-256x256": ("dit_s_2", 32),
    "DiT-XL-2-256x256": ("dit_xl_2", 32),
    "DiT-XL-2-512x512": ("dit_xl_2", 64),
}


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {key: list(value.shape) for key, value in tensors.items()}


@pytest.fixture
def tiny() -> DiT:
    network = DiT(**json.loads((GOLDEN / "tiny_dit_config.json").read_text()))
    network.load_state_dict(golden("tiny_dit_weights"))
    return network.eval()


@pytest.fixture
def folder(tiny, tmp_path):
    """The tiny DiT as diffusers saves it; `write(config, tensors)` changes something."""

    def write(config=None, change=lambda tensors: tensors):
        where = tmp_path / "transformer"
        where.mkdir(exist_ok=True)
        theirs = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 4, "attention_head_dim": 16}
        theirs |= {"in_channels": 4, "out_channels": 8, "num_layers": 3, "sample_size": 8, "patch_size": 2}
        theirs |= {"num_embeds_ada_norm": 10, "norm_type": "ada_norm_zero", **(config or {})}
        (where / "config.json").write_text(json.dumps(theirs))
        save_file(change(to_theirs(tiny.state_dict())), where / "diffusion_pytorch_model.safetensors")
        return where

    return write


def test_keys_and_shapes_are_those_of_diffusers():
    with torch.device("meta"):
        ours = build_network("dit_xl_2").state_dict()
    theirs = to_theirs(ours)
    assert shapes(theirs) == json.loads((GOLDEN / "diffusers_keys_DiT-XL-2-256.json").read_text())


def test_a_folder_of_diffusers_has_the_reference_network(tiny, folder):
    for path in (folder(), folder().parent):  # of the model, and of the pipeline
        network = load_network(path).eval()
        assert network.config == tiny.config
        for key, value in tiny.state_dict().items():
            assert torch.equal(network.state_dict()[key], value), key
    inputs, expected = golden("tiny_dit_forward"), golden("diffusers_tiny_forward")["out_reference"]
    with torch.no_grad():
        out = network(inputs["x"], inputs["t"], inputs["y"])
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=0)


def test_to_ours_inverts_to_theirs(tiny, tmp_path):
    weights = {key: value for key, value in tiny.state_dict().items() if key != "pos_embed"}
    back = composed(to_ours(to_theirs(weights), 3, Source(tmp_path)))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


BLOCK_2 = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"norm_type": "ada_norm"}, dict, "another network than DiT"),
        ({}, lambda t: t | {BLOCK_2: t[BLOCK_2] + 1}, "in block 2 than in block 0"),
        ({}, lambda t: {k: v for k, v in t.items() if "to_k" not in k}, "has no transformer_blocks.0.attn1.to_k"),
        ({}, lambda t: t | {"more": torch.ones(1)}, "tensors that DiT has not, as more"),
        ({"num_layers": 4}, dict, "has no transformer_blocks.3"),
        ({"num_embeds_ada_norm": 12}, dict, "does not fit"),
        ({"_class_name": "UNet2DModel"}, dict, "no kind that is known"),
    ],
)
def test_other_folders_are_refused(folder, config, change, message):
    with pytest.raises(UserError, match=message):
        load_network(folder(config, change))


@pytest.mark.parametrize("content", [{"weights": torch.ones(2)}, [1, 2], torch.ones(2), {"ema": 3}])
def test_other_files_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match="no kind that is known"):
        load_network(tmp_path / "x.pt")

"""Foreign checkpoints in several files: parts with an index, variants, folders of diffusers."""

import copy

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from ditune.autoencoders import KL
from ditune.checkpoints import load_network
from ditune.checkpoints.diffusers_dit import to_theirs
from ditune.errors import UserError
from foreign_files import STEM, assert_read, parts


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_official_keys_in_parts(tmp_path, tensors, end):
    index = f"model.{end}.index.json"
    parts(tmp_path, tensors, "model", end, index)
    assert_read(tmp_path, tensors)
    assert_read(tmp_path / index, tensors)
    (tmp_path / f"model-00002-of-00002.{end}").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.\w+, and they are not there"):
        load_network(tmp_path)


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

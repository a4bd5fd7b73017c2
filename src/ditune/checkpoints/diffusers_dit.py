"""DiT as diffusers keeps it: a folder of DiTTransformer2DModel, or of a DiTPipeline with such a folder in it.

diffusers copies both embedders into every block and splits qkv. Its model also computes the timestep's frequencies as
10000^(-k/127) where DiT, whose weights these are, has 10000^(-k/128); networks that are read here have DiT's.
"""

import re
from typing import Any

import torch
from torch import Tensor

from ditune.errors import UserError
from ditune.networks import DiT

from .source import Content, Source

CLASS = "DiTTransformer2DModel"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
EMBEDDERS = "norm1.emb."
# ours: theirs. In blocks, after `blocks.{i}.` and `transformer_blocks.{i}.`
# fmt: off
BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj":          "attn1.to_out.0",
    "mlp.fc1":            "ff.net.0.proj",
    "mlp.fc2":            "ff.net.2",
}
OUTSIDE = {
    "x_embedder.proj":                  "pos_embed.proj",
    "final_layer.adaLN_modulation.1":   "proj_out_1",
    "final_layer.linear":               "proj_out_2",
}
COPIED = {
    "t_embedder.mlp.0":                 "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2":                 "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table":       "norm1.emb.class_embedder.embedding_table",
}
# fmt: on


def recognises(source: Source) -> bool:
    return source.path.is_dir() and _folder(source).json("config.json").get("_class_name") == CLASS


def read(source: Source, **_: Any) -> Content:
    source = _folder(source)
    config = _config(source)
    return Content(DiT, config, to_ours(_weights(source), config["depth"], source))


def process(source: Source) -> dict[str, Any]:
    return {}


def drawing(source: Source) -> dict[str, Any]:
    """250 ancestral steps and guidance 1.5 are behind the FID of arXiv 2212.09748, Table 4."""
    return {"sampler": "DDPM", "steps": 250, "guidance": 1.5, "guidance_channels": 3}


def _folder(source: Source) -> Source:
    inner = source.path / "transformer"
    return Source(inner) if inner.is_dir() else source


def _config(source: Source) -> dict[str, Any]:
    theirs = source.json("config.json")
    fixed = {"norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate", "attention_bias": True}
    wrong = [f"{key} {theirs[key]}" for key, value in fixed.items() if theirs.get(key, value) != value]
    if wrong:
        raise UserError(f"{source.path} is another network than DiT ({', '.join(wrong)}). Give one that is DiT's.")
    try:
        channels = theirs["in_channels"]
        return {
            "input_size": theirs["sample_size"],
            "patch_size": theirs["patch_size"],
            "in_channels": channels,
            "hidden_size": theirs["num_attention_heads"] * theirs["attention_head_dim"],
            "depth": theirs["num_layers"],
            "num_heads": theirs["num_attention_heads"],
            "num_classes": theirs["num_embeds_ada_norm"],
            "learn_sigma": (theirs["out_channels"] or channels) == 2 * channels,
        }
    except KeyError as error:
        raise UserError(f"{source.path / 'config.json'} lacks {error}. Fetch the folder again.") from error


def _weights(source: Source) -> dict[str, Tensor]:
    index = source.json(f"{WEIGHTS[0]}.index.json")
    files = sorted(set(index["weight_map"].values())) if index else [n for n in WEIGHTS if (source.path / n).exists()]
    if not files:
        raise UserError(f"{source.path} has no {WEIGHTS[0]}. Fetch the folder again.")
    tensors: dict[str, Tensor] = {}
    for file in files if index else files[:1]:
        tensors |= Source(source.path / file).content
    return tensors


def to_ours(theirs: dict[str, Tensor], depth: int, source: Source) -> dict[str, Tensor]:
    """Our state dict from theirs, without the computed position table.

    Raises:
        UserError: keys are missing or left over, or the embedders' copies differ.
    """
    ours: dict[str, Tensor] = {}
    left = dict(theirs)
    left.pop("pos_embed.pos_embed", None)  # a table that is computed

    def take(key: str) -> Tensor:
        if key not in left:
            raise UserError(f"{source.path} has no {key}. Fetch the folder again.")
        return left.pop(key)

    for end in ("weight", "bias"):
        for our, their in OUTSIDE.items():
            ours[f"{our}.{end}"] = take(f"{their}.{end}")
        for i in range(depth):
            block = f"transformer_blocks.{i}."
            for our, their in BLOCK.items():
                ours[f"blocks.{i}.{our}.{end}"] = take(f"{block}{their}.{end}")
            parts = [take(f"{block}attn1.to_{part}.{end}") for part in "qkv"]
            ours[f"blocks.{i}.attn.qkv.{end}"] = torch.cat(parts)
            for our, their in COPIED.items():
                if our == "y_embedder.embedding_table" and end == "bias":
                    continue
                copy = take(f"{block}{their}.{end}")
                if not torch.equal(ours.setdefault(f"{our}.{end}", copy), copy):
                    raise UserError(
                        f"{source.path} has another {their}.{end} in block {i} than in block 0, where DiT has one for "
                        "all. Give a folder that was converted from DiT."
                    )
    if left:
        raise UserError(f"{source.path} has {len(left)} tensors that DiT has not, as {min(left)}.")
    return ours


def to_theirs(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict from ours; inverts `to_ours`."""
    theirs: dict[str, Tensor] = {}
    depth = 1 + max(int(key.split(".")[1]) for key in ours if key.startswith("blocks."))
    for key, tensor in ours.items():
        if key == "pos_embed":
            continue
        name, end = key.rsplit(".", 1)
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if name in OUTSIDE:
            theirs[f"{OUTSIDE[name]}.{end}"] = tensor
        elif name in COPIED:
            for i in range(depth):
                theirs[f"transformer_blocks.{i}.{COPIED[name]}.{end}"] = tensor.clone()
        elif block and block[2] == "attn.qkv":
            for part, chunk in zip("qkv", tensor.chunk(3), strict=True):
                theirs[f"transformer_blocks.{block[1]}.attn1.to_{part}.{end}"] = chunk.contiguous()
        elif block and block[2] in BLOCK:
            theirs[f"transformer_blocks.{block[1]}.{BLOCK[block[2]]}.{end}"] = tensor
        else:
            raise UserError(f"diffusers' DiT has no place for {key}. Merge the adapter first: `merge=true`.")
    return theirs

"""DiT as diffusers keeps it: a folder of DiTTransformer2DModel, or of a DiTPipeline with such a folder in it.

diffusers copies both embedders into every block and splits qkv. Its model also computes the timestep's frequencies as
10000^(-k/127) where DiT, whose weights these are, has 10000^(-k/128); networks that are read here have DiT's.
"""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditune.checkpoints.official_dit import depth_of, sampling  # noqa: F401  # sampling: the same networks
from ditune.checkpoints.source import Composed, Content, Source
from ditune.checkpoints.weight_files import find_weights, listed
from ditune.errors import UserError
from ditune.networks import DiT

TITLE = "diffusers' DiT"
CLASS = "DiTTransformer2DModel"
STEM = "diffusion_pytorch_model"
PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}  # theirs: ours
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
    """Whether this is a folder of diffusers' DiT, or of a pipeline with one in it."""
    return source.path.is_dir() and _folder(source).json("config.json").get("_class_name") == CLASS


def read(source: Source, known: Mapping[str, Any], **_: Any) -> Content:
    """The network in a folder, whose config.json says all of its arguments."""
    source = _folder(source)
    config = _config(source)
    return Content(DiT, config, to_ours(_weights(source), config["depth"], source))


def process(source: Source) -> dict[str, Any] | None:
    """Config of the process that the pipeline's scheduler names; None for a model without a pipeline.

    Raises:
        UserError: the scheduler belongs to no diffusion that is known.
    """
    theirs = source.json("scheduler/scheduler_config.json")
    if not theirs:
        return None
    timesteps, prediction = theirs.get("num_train_timesteps", 1000), theirs.get("prediction_type", "epsilon")
    schedule = _schedule(theirs, timesteps)
    if "Flow" in str(theirs.get("_class_name")) or schedule is None or prediction not in PREDICTIONS:
        raise UserError(
            f"{source.path} has the scheduler {theirs.get('_class_name')} ({theirs.get('beta_schedule')}, {prediction})"
            ", which is of no diffusion that is known. Set process= to what it was trained on (pretrained_process= in "
            "train.py): sit, repa, or a process's config."
        )
    learned = _config(_folder(source))["learn_sigma"]
    variance = "learned_range" if learned else "fixed_large"
    return {
        "schedule": schedule,
        "timesteps": timesteps,
        "prediction": PREDICTIONS[prediction],
        "variance": variance,
        "respacing": "",
    }


def _schedule(theirs: dict[str, Any], timesteps: int) -> str | None:
    """Our name of a scheduler's betas; None for betas that are not known here."""
    if theirs.get("trained_betas") is None:
        ends = theirs.get("beta_start", 1e-4), theirs.get("beta_end", 0.02)
        linear = theirs.get("beta_schedule", "linear") == "linear" and ends == (1e-4, 0.02) and timesteps == 1000
        return "linear" if linear else {"squaredcos_cap_v2": "cosine"}.get(theirs.get("beta_schedule"))
    betas = np.asarray(theirs["trained_betas"], dtype=np.float64)
    at = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2  # arXiv 2102.09672, (17)
    known = {
        "linear": np.linspace(0.1, 20, timesteps) / timesteps,
        "cosine": np.minimum(1 - at[1:] / at[:-1], 0.999),
    }
    return next((name for name, ours in known.items() if ours.shape == betas.shape and np.allclose(ours, betas)), None)


def _folder(source: Source) -> Source:
    inner = source.path / "transformer"
    return source.part(inner) if inner.is_dir() else source


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
    weights = find_weights(source.path, STEM)
    if weights is None:
        raise UserError(
            f"{source.path} has no {STEM}.safetensors, nor a variant or parts of it. It holds {listed(source.path)}. "
            "Fetch the weights too."
        )
    return {key: value for file in weights.files for key, value in source.part(file).entries.items()}


def to_ours(theirs: dict[str, Tensor], depth: int, source: Source) -> dict[str, Tensor | Composed]:
    """Our state dict from theirs, without the computed position table.

    Keys are compared here. Whether the embedders' copies are equal is seen where their numbers are read.

    Args:
        theirs: their state dict.
        depth: number of blocks.
        source: the folder, for messages.

    Raises:
        UserError: keys are missing or left over.
    """
    ours: dict[str, Tensor | Composed] = {}
    copies: dict[str, list[Tensor]] = {}  # of the embedders, by the end of their keys
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
            size = sum(len(part) for part in parts)
            ours[f"blocks.{i}.attn.qkv.{end}"] = Composed((size, *parts[0].shape[1:]), partial(torch.cat, parts))
            for our, their in COPIED.items():
                if our == "y_embedder.embedding_table" and end == "bias":
                    continue
                own = copies.setdefault(f"{their}.{end}", [])
                own.append(take(f"{block}{their}.{end}"))
                ours[f"{our}.{end}"] = Composed(own[0].shape, partial(_the_same, own, f"{their}.{end}", source.path))
    if left:
        raise UserError(f"{source.path} has {len(left)} tensors that DiT has not, as {min(left)}.")
    return ours


def _the_same(copies: list[Tensor], key: str, path: Path) -> Tensor:
    """The one tensor that every block has a copy of.

    Raises:
        UserError: the copies differ.
    """
    for i, copy in enumerate(copies):
        if not torch.equal(copies[0], copy):
            raise UserError(
                f"{path} has another {key} in block {i} than in block 0, where DiT has one for all. Give a folder that "
                "was converted from DiT."
            )
    return copies[0]


def to_theirs(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict from ours; inverts `to_ours`.

    Raises:
        UserError: a tensor is none of DiT's, such as an adapter's.
    """
    theirs: dict[str, Tensor] = {}
    depth = depth_of(ours)
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

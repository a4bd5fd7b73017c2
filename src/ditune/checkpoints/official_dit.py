"""DiT as facebookresearch/DiT publishes and saves it, and networks with its keys: SiT's and REPA's.

The three differ in what they were trained on, which only some files say: REPA's have projectors, and files of the
training codes of SiT and REPA hold their arguments.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ditune.checkpoints.source import Content, Source
from ditune.errors import UserError
from ditune.networks import DiT

TITLE = "official DiT"
# Hidden size: heads, of published files (arXiv 2212.09748, Table 1). No network of ours is ever added here.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
PROJECTORS = "projectors."  # of REPA (arXiv 2410.06940), for its training only
# Networks get unscaled times. SiT's transport/path.py goes from noise at 0 to data at 1, REPA's loss.py the other way.
SIT = {"kind": "flow", "time_scale": 1.0, "data_at": 1, "sigma_min": 0.0}
REPA = {"kind": "flow", "time_scale": 1.0, "data_at": 0, "sigma_min": 0.0}


def recognises(source: Source) -> bool:
    """Whether the tensors have the names of DiT's blocks."""
    return {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.mlp.fc1.weight"} <= set(
        source.tensors
    )


def read(source: Source, known: Mapping[str, Any], **overrides: Any) -> Content:
    """The network in a file; arguments as in `ditune.checkpoints.load_network`."""
    tensors = {key: value for key, value in source.tensors.items() if not key.startswith(PROJECTORS)}
    return Content(DiT, infer_config(tensors, source, known, **overrides), tensors)


def process(source: Source) -> dict[str, Any] | None:
    """Config of the process that the file names beside its weights; None if it names none.

    Raises:
        UserError: the network was trained on a process that is not known here.
    """
    said = source.attributes()
    path, prediction = str(said.get("path_type", "linear")).lower(), said.get("prediction", "v")
    if path != "linear" or ("path_type" in said and prediction not in ("v", "velocity")):
        raise UserError(
            f"{source.path} says that it was trained on the path {path} to predict {prediction}; of flows only "
            "velocities on the linear path are known. Give another file, or say by process= what it is."
        )
    if any(key.startswith(PROJECTORS) for key in source.tensors) or {"path_type", "enc_type"} <= said.keys():
        return REPA
    return SIT if "path_type" in said else None


def sampling(process: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Sampler settings of the papers, keys as in configs/sampler/.

    Diffusion: 250 ancestral steps and guidance 1.5, behind the FID of arXiv 2212.09748, Table 4. Flows: as many
    evaluations as in arXiv 2401.08740, by Euler's method, and its guidance 1.5.

    Args:
        process: config of the network's process.
        config: of the network.
    """
    if process.get("kind") == "flow":
        return {"sampler": "Euler", "steps": 250, "guidance": 1.5}
    return {"sampler": "DDPM", "steps": 250, "guidance": 1.5, "guidance_channels": 3}


def infer_config(
    tensors: dict[str, Tensor],
    source: Source,
    known: Mapping[str, Any],
    input_size: int | None = None,
    num_heads: int | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Constructor arguments of DiT from shapes; the number of heads from the published sizes.

    Args:
        tensors: the state dict.
        source: the file, for messages.
        known: config of a network that is known to be of this kind, for what the file cannot tell.
        input_size: side of the latents; None = from the position table.
        num_heads: None = as in the published sizes.
        overrides: see `infer_classes`.

    Raises:
        UserError: the file does not tell an argument.
    """
    common = infer_common(tensors, source, known, input_size, **overrides)
    hidden_size = common["hidden_size"]
    return common | {
        "num_heads": num_heads or infer_heads(HEADS, hidden_size, source, known),
        "mlp_ratio": ratio(tensors["blocks.0.mlp.fc1.weight"].shape[0], hidden_size),
    }


def infer_common(
    tensors: dict[str, Tensor],
    source: Source,
    known: Mapping[str, Any],
    input_size: int | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Those constructor arguments that DiT and DiT-MoE share, from shapes; arguments as in `infer_config`."""
    hidden_size, in_channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    out = tensors["final_layer.linear.bias"].numel() // patch_size**2
    return {
        "input_size": input_size or infer_input_size(tensors, source, patch_size),
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": depth_of(tensors),
        "learn_sigma": out == 2 * in_channels,
        **infer_classes(tensors, known, **overrides),
    }


def depth_of(tensors: Mapping[str, Tensor]) -> int:
    """Number of blocks, from the names of tensors."""
    return 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))


def ratio(width: int, hidden_size: int) -> float:
    """The ratio whose product with the hidden size, rounded down, is the width."""
    found = width / hidden_size
    return found if int(hidden_size * found) == width else math.nextafter(found, math.inf)


def infer_heads(published: Mapping[int, int], hidden_size: int, source: Source, known: Mapping[str, Any]) -> int:
    """Number of attention heads, which no shape tells.

    Args:
        published: hidden size: heads, of published files.
        hidden_size: of the network.
        source: the file, for messages.
        known: config of a network of this kind; its heads are taken if its hidden size is this one.

    Raises:
        UserError: neither gives the heads of this width.
    """
    heads = published.get(hidden_size)
    if heads is None and known.get("hidden_size", hidden_size) == hidden_size:
        heads = known.get("num_heads")
    if heads is None:
        raise UserError(
            f"{source.path} has the unpublished hidden size {hidden_size}, and no shape tells its heads. Give them: "
            "network_overrides.num_heads=<heads> with checkpoint=, network=as_pretrained +network.num_heads=<heads> "
            "with pretrained=."
        )
    return heads


def infer_input_size(tensors: dict[str, Tensor], source: Source, patch_size: int) -> int:
    """Side of the latents, from the position table.

    Raises:
        UserError: the file has no position table.
    """
    if "pos_embed" not in tensors:
        raise UserError(
            f"{source.path} has no pos_embed, which would tell its resolution. Give input_size: "
            "network_overrides.input_size=<latent pixels>, or +network.input_size with network=as_pretrained."
        )
    return round(tensors["pos_embed"].shape[1] ** 0.5) * patch_size


def infer_classes(tensors: dict[str, Tensor], known: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """Number of classes, and whether the label table has a last row for the null class.

    Every published file has that row. The caller says that it is missing by as many classes as there are rows, or by
    class_dropout_prob = 0.

    Args:
        tensors: the state dict.
        known: config of a network that is known to be of this kind.
        overrides: constructor arguments that the caller sets.
    """
    rows = tensors["y_embedder.embedding_table.weight"].shape[0]
    given = overrides if {"num_classes", "class_dropout_prob"} & overrides.keys() else known
    without = given.get("num_classes", rows) == rows and given.get("class_dropout_prob", 0.1) <= 0
    if without or overrides.get("num_classes") == rows or overrides.get("class_dropout_prob", 0.1) <= 0:
        return {"num_classes": rows, "class_dropout_prob": 0.0}
    return {"num_classes": rows - 1}

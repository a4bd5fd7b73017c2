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
# Times are told unscaled. SiT's transport/path.py goes from noise at 0 to data at 1, REPA's loss.py the other way.
SIT = {"kind": "flow", "time_scale": 1.0, "data_at": 1, "sigma_min": 0.0}
REPA = {"kind": "flow", "time_scale": 1.0, "data_at": 0, "sigma_min": 0.0}


def recognises(source: Source) -> bool:
    return {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.mlp.fc1.weight"} <= set(
        source.tensors
    )


def read(source: Source, known: Mapping[str, Any], **overrides: Any) -> Content:
    tensors = {key: value for key, value in source.tensors.items() if not key.startswith(PROJECTORS)}
    return Content(DiT, infer_config(tensors, source, known, **overrides), tensors)


def process(source: Source) -> dict[str, Any] | None:
    """By what the file holds beside the weights; None where it says nothing.

    Raises:
        UserError: it was trained on what is not known here.
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


def drawing(process: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """250 ancestral steps and guidance 1.5 are behind the FID of arXiv 2212.09748, Table 4.

    For flows as many evaluations as in arXiv 2401.08740, by Euler's method, guided at 1.5 as there.
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
    """Constructor arguments from shapes; the number of heads from the published sizes."""
    hidden_size, in_channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    out = tensors["final_layer.linear.bias"].numel() // patch_size**2
    return {
        "input_size": input_size or infer_input_size(tensors, source, patch_size),
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks.")),
        "num_heads": num_heads or infer_heads(HEADS, hidden_size, source, known),
        "mlp_ratio": ratio(tensors["blocks.0.mlp.fc1.weight"].shape[0], hidden_size),
        "learn_sigma": out == 2 * in_channels,
        **infer_classes(tensors, known, **overrides),
    }


def ratio(width: int, hidden_size: int) -> float:
    """The ratio whose product with the hidden size, rounded down, is the width."""
    found = width / hidden_size
    return found if int(hidden_size * found) == width else math.nextafter(found, math.inf)


def infer_heads(published: Mapping[int, int], hidden_size: int, source: Source, known: Mapping[str, Any]) -> int:
    """Heads of a published width, else those that `known` gives for this width; shapes do not tell them."""
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
    """Side of the input, from the position table."""
    if "pos_embed" not in tensors:
        raise UserError(
            f"{source.path} has no pos_embed, which would tell its resolution. Give input_size: "
            "network_overrides.input_size=<latent pixels>, or +network.input_size with network=as_pretrained."
        )
    return round(tensors["pos_embed"].shape[1] ** 0.5) * patch_size


def infer_classes(tensors: dict[str, Tensor], known: Mapping[str, Any], **overrides: Any) -> dict[str, Any]:
    """Classes, and whether the label table's last row is the null class, as in every published file.

    It is not where the caller says so: by as many classes as there are rows, or by a class_dropout_prob of 0.
    """
    rows = tensors["y_embedder.embedding_table.weight"].shape[0]
    given = overrides if {"num_classes", "class_dropout_prob"} & overrides.keys() else known
    without = given.get("num_classes", rows) == rows and given.get("class_dropout_prob", 0.1) <= 0
    if without or overrides.get("num_classes") == rows or overrides.get("class_dropout_prob", 0.1) <= 0:
        return {"num_classes": rows, "class_dropout_prob": 0.0}
    return {"num_classes": rows - 1}

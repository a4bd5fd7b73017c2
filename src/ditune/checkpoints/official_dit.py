"""DiT as facebookresearch/DiT publishes and saves it: a `.pt` file, bare or with "ema" and "model" inside."""

from typing import Any

from torch import Tensor

from ditune.errors import UserError
from ditune.networks import DiT
from ditune.networks.dit import SIZES

from .source import Content, Source


def recognises(source: Source) -> bool:
    return {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.mlp.fc1.weight"} <= set(
        source.tensors
    )


def read(source: Source, **overrides: Any) -> Content:
    return Content(DiT, infer_config(source, **overrides), dict(source.tensors))


def process(source: Source) -> dict[str, Any]:
    return {}


def drawing(source: Source) -> dict[str, Any]:
    """250 ancestral steps and guidance 1.5 are behind the FID of arXiv 2212.09748, Table 4."""
    return {"sampler": "DDPM", "steps": 250, "guidance": 1.5, "guidance_channels": 3}


def infer_config(source: Source, input_size: int | None = None, **_: Any) -> dict[str, Any]:
    """Constructor arguments from shapes; the number of heads from the published sizes."""
    tensors: dict[str, Tensor] = source.tensors
    hidden_size, in_channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    heads = {hidden: num_heads for hidden, _, num_heads in SIZES.values()}
    if hidden_size not in heads:
        raise UserError(
            f"{source.path} has the unpublished hidden size {hidden_size}. Save it in this project's format."
        )
    if input_size is None:
        if "pos_embed" not in tensors:
            raise UserError(f"{source.path} has no pos_embed, which would tell its resolution. Give input_size.")
        input_size = round(tensors["pos_embed"].shape[1] ** 0.5) * patch_size
    out = tensors["final_layer.linear.bias"].numel() // patch_size**2
    return {
        "input_size": input_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks.")),
        "num_heads": heads[hidden_size],
        "num_classes": tensors["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": out == 2 * in_channels,
    }

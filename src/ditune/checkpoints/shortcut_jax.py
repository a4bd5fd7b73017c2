"""Checkpoints of the shortcut models' own code (kvfrans/shortcut-models): pickled trees of numpy arrays.

A pickle can run anything. This one is read by an unpickler that builds arrays, dicts and numbers and refuses the rest;
JAX need not be installed. Differences of the network are folded into the weights: its logits are q k / d instead of
q k / sqrt(d), and it has separate layers for keys, queries and values, in this order.
"""

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditune.checkpoints.official_dit import depth_of, infer_heads
from ditune.checkpoints.source import Content, Source
from ditune.errors import UserError
from ditune.networks import DiT

TITLE = "shortcut models' pickle"
# Hidden size: heads, of the code's configurations. No network of ours is ever added here.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}

# how its networks are conditioned on time and step size; a config of ditune.processes
PROCESS = {
    "kind": "flow",
    "time_scale": 1.0,
    "data_at": 1,
    "sigma_min": 1e-5,
    "step": "log2",
    "base_steps": 128,
}
UNUSED = "Embed_0/embedding"  # a table of the original that nothing reads


class _Ignored(dict):
    """Stand-in for the optimizer's state and for frozen dicts: keeps only the entries of a dict."""

    def __new__(cls, *_: object) -> "_Ignored":
        return super().__new__(cls)

    def __init__(self, *content: object):
        super().__init__(*(c for c in content[:1] if isinstance(c, dict)))

    def __setstate__(self, state: object) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            self.update(part.get("_dict", part) if isinstance(part, dict) else {})


NUMPY = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
ARRAYS = {(module, name) for module in NUMPY for name in ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer")}


class _Stranger(pickle.UnpicklingError):
    """The file is whole, but asks for objects that weights do not need."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        root = module.split(".")[0]
        if (module, name) in ARRAYS:
            return super().find_class(module, name)
        if root == "optax" or (root == "flax" and name == "FrozenDict"):
            return _Ignored
        raise _Stranger(f"it asks for {module}.{name}, which is no part of weights")

    def persistent_load(self, pid: object) -> Any:
        raise _Stranger("it refers to something outside of itself")


def process(source: Source) -> dict[str, Any]:
    """Config of the process, which is the same for all of these files."""
    return PROCESS


def sampling(process: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Sampler settings of the code's README: 128 steps, guidance 1.5 if there are classes (ImageNet).

    Args:
        process: config of the network's process.
        config: of the network.
    """
    return {"sampler": "Jumps", "steps": 128, "guidance": 1.5 if config["num_classes"] > 1 else 1.0}


def recognises(source: Source) -> bool:
    """Whether this is a bare pickle, and not a file of torch."""
    return source.kind == "pickle"


def read(
    source: Source, known: Mapping[str, Any], num_heads: int | None = None, input_size: int = 32, **_: Any
) -> Content:
    """The network in a file.

    The position table is not stored. All published networks have 32 x 32 latents and patches of 2.

    Args:
        source: the pickle.
        known: config of a network that is known to be of this kind.
        num_heads: None = as in the code's configurations.
        input_size: side of the latents.

    Raises:
        UserError: the file is damaged, holds more than weights, or does not tell its heads.
    """
    parameters = read_shortcut(source.path)
    patch_size, _, in_channels, hidden_size = parameters["PatchEmbed_0/Conv_0/kernel"].shape
    num_heads = num_heads or infer_heads(HEADS, hidden_size, source, known)
    tensors = convert_shortcut(parameters, num_heads)
    config = {
        "input_size": input_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": depth_of(tensors),
        "num_heads": num_heads,
        "num_classes": tensors["y_embedder.embedding_table.weight"].shape[0] - 1,
        "learn_sigma": False,
        "step": True,
    }
    return Content(DiT, config, tensors)


def read_shortcut(path: Path | str, ema: bool = True) -> dict[str, Tensor]:
    """Parameters of a checkpoint, by names like `DiTBlock_0/Dense_1/kernel`.

    Args:
        path: the pickle.
        ema: read the EMA of the parameters (`params_ema`), else the parameters themselves.

    Raises:
        UserError: the file is damaged, holds more than weights, or is of another kind.
    """
    try:
        with open(path, "rb") as file:
            content = _Unpickler(file).load()
        tree = content["train_state"]["params_ema" if ema else "params"]
    except _Stranger as error:
        raise UserError(
            f"{path} holds more than weights: {error}, and nothing was executed. Save its parameters without that."
        ) from error
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}). Copy or fetch it again.") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no shortcut checkpoint: it has no train_state. Give another file.") from error
    return dict(_flat(tree, ""))


def _flat(tree: dict, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", torch.from_numpy(np.array(value, dtype=np.float32))


def convert_shortcut(parameters: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    """Tensors of our DiT (`step=True`, `learn_sigma=False`) from parameters in the original's layout.

    Args:
        parameters: by `read_shortcut`'s names; dense kernels are (in, out), the convolution's (h, w, in, out).
        num_heads: heads of each attention.

    Raises:
        UserError: there are parameters of another network.
    """
    left = {name: value for name, value in parameters.items() if name != UNUSED}
    tensors: dict[str, Tensor] = {}

    def dense(theirs: str, ours: str) -> None:
        tensors[f"{ours}.weight"] = left.pop(f"{theirs}/kernel").T.contiguous()
        tensors[f"{ours}.bias"] = left.pop(f"{theirs}/bias")

    tensors["x_embedder.proj.weight"] = left.pop("PatchEmbed_0/Conv_0/kernel").permute(3, 2, 0, 1).contiguous()
    tensors["x_embedder.proj.bias"] = left.pop("PatchEmbed_0/Conv_0/bias")
    tensors["y_embedder.embedding_table.weight"] = left.pop("LabelEmbedder_0/Embed_0/embedding")
    for k, embedder in enumerate(("t_embedder", "step_embedder")):
        dense(f"TimestepEmbedder_{k}/Dense_0", f"{embedder}.mlp.0")
        dense(f"TimestepEmbedder_{k}/Dense_1", f"{embedder}.mlp.2")
    depth = len({name.split("/")[0] for name in left if name.startswith("DiTBlock_")})
    for i in range(depth):
        theirs, ours = f"DiTBlock_{i}", f"blocks.{i}"
        dense(f"{theirs}/Dense_0", f"{ours}.adaLN_modulation.1")
        for k, name in enumerate(("k", "q", "v"), start=1):
            dense(f"{theirs}/Dense_{k}", name)
        head_size = tensors["q.weight"].shape[0] // num_heads
        for kind in ("weight", "bias"):
            q, k, v = (tensors.pop(f"{name}.{kind}") for name in "qkv")
            tensors[f"{ours}.attn.qkv.{kind}"] = torch.cat([q * head_size**-0.5, k, v])
        dense(f"{theirs}/Dense_4", f"{ours}.attn.proj")
        dense(f"{theirs}/MlpBlock_0/Dense_0", f"{ours}.mlp.fc1")
        dense(f"{theirs}/MlpBlock_0/Dense_1", f"{ours}.mlp.fc2")
    dense("FinalLayer_0/Dense_0", "final_layer.adaLN_modulation.1")
    dense("FinalLayer_0/Dense_1", "final_layer.linear")
    if left:
        raise UserError(f"The checkpoint has parameters of another network: {', '.join(left)}. Give another file.")
    return tensors

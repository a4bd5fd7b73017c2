"""Networks as files: ours (safetensors that explain themselves) and the official DiT `.pt` files."""

import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ditune.errors import UserError
from ditune.networks import DiT
from ditune.networks.dit import SIZES

from .files import atomic

FORMAT = "ditune-network-1"


def save_network(path: Path | str, network: DiT, process: dict, **provenance) -> None:
    """Write weights in fp32; the configs of network and process, and `provenance`, go into the header.

    Args:
        path: `.safetensors` file to write.
        network: a plain network (merge an adapter first).
        process: config of the process that the network was trained for.
        provenance: what else a reader should know: class names, training set, steps, metrics.
    """
    header = {"format": FORMAT, "network": network.config, "process": process, "provenance": provenance}
    # the position table is computed from the config, so it is not stored
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in network.state_dict().items() if k != "pos_embed"}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"ditune": json.dumps(header)})


def read_header(path: Path | str) -> dict:
    """Header of one of our network files: keys format, network, process, provenance.

    Raises:
        UserError: the file is missing, damaged, or not one of ours.
    """
    path = _existing(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("ditune", "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}). Fetch or train it again.") from error
    if header.get("format") != FORMAT:
        raise UserError(f"{path} is no network file of this project. Give one written by save_network.")
    return header


def load_network(path: Path | str, **overrides) -> DiT:
    """Build the network that a file holds, with its weights.

    Args:
        path: our `.safetensors`, or an official DiT `.pt` (bare, or with "ema" or "model" inside, "ema" first).
        overrides: constructor arguments that replace those of the file (`input_size` for another resolution).

    Raises:
        UserError: the file is missing, damaged, of an unknown kind, or does not fit the overrides.
    """
    path = _existing(path)
    if path.suffix == ".safetensors":
        config = read_header(path)["network"]
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    else:
        tensors = _read_official(path)
        config = _infer_config(tensors, path, **overrides)
    network = DiT(**(config | overrides))
    try:
        network.load_state_dict(tensors)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not fit the network: {error}. Check the overrides {overrides}.") from error
    network.file = path
    return network


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no network file {path}. Check the path, or restore the file from the repository.")
    return path


def _read_official(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path} is damaged, or holds more than tensors: {error}. Fetch it again.") from error
    content = content.get("ema", content.get("model", content))
    if "x_embedder.proj.weight" not in content:
        raise UserError(f"{path} is no DiT checkpoint: it has no x_embedder.proj.weight. Give an official DiT file.")
    return content


def _infer_config(tensors: dict[str, Tensor], path: Path, input_size: int | None = None, **_) -> dict:
    """Constructor arguments from shapes; the number of heads from the published sizes."""
    hidden_size, in_channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
    heads = {hidden: num_heads for hidden, _, num_heads in SIZES.values()}
    if hidden_size not in heads:
        raise UserError(f"{path} has the unpublished hidden size {hidden_size}. Save it in this project's format.")
    if input_size is None:
        if "pos_embed" not in tensors:
            raise UserError(f"{path} has no pos_embed, which would tell its resolution. Give input_size.")
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

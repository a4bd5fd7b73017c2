"""Adapters as folders: `adapter_model.safetensors` holds what trained, `adapter_config.json` says onto what it goes."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditune.errors import UserError
from ditune.networks import DiT
from ditune.peft import PeftMethod, build_peft

from .files import atomic, write_json

FORMAT = "ditune-adapter-1"


def save_adapter(folder: Path | str, tensors: dict[str, Tensor], **config) -> None:
    """Write an adapter.

    Args:
        folder: created if missing.
        tensors: `PeftMethod.state_dict(network)`, or its EMA.
        config: peft (name and arguments), network, process, base (file name and sha256), class_names, data.
    """
    folder = Path(folder)
    with atomic(folder / "adapter_model.safetensors") as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", {"format": FORMAT, **config})


def read_adapter(folder: Path | str) -> tuple[dict, dict[str, Tensor]]:
    """Config and tensors of an adapter.

    Raises:
        UserError: a file is missing, damaged, or of another format.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no adapter: {error.filename} is missing. Give a run's adapter/.") from error
    except (json.JSONDecodeError, SafetensorError) as error:
        raise UserError(f"The adapter in {folder} is damaged ({error}). Train or copy it again.") from error
    if config.get("format") != FORMAT:
        raise UserError(f"{folder} has the adapter format {config.get('format')!r}, expected {FORMAT!r}.")
    return config, tensors


def load_adapter(network: DiT, folder: Path | str) -> PeftMethod:
    """Apply the adapter's method to a base network and load what it trained; returns the method.

    Raises:
        UserError: the adapter is damaged or was trained on another network.
    """
    config, tensors = read_adapter(folder)
    if config["network"] != network.config:
        ours, theirs = network.config, config["network"]
        different = [f"{k} {theirs.get(k)} (here {ours.get(k)})" for k in ours if ours.get(k) != theirs.get(k)]
        raise UserError(
            f"The adapter in {folder} belongs to another network: {', '.join(different)}. "
            f"Load it onto its own base, {config['base']['file']}."
        )
    method = build_peft(**config["peft"])
    method.apply(network)
    method.load_state_dict(network, tensors)
    return method

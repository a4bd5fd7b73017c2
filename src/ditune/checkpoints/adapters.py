"""Adapters as folders: `adapter_model.safetensors` holds what trained, `adapter_config.json` says onto what it goes.

Methods of huggingface peft are written in peft's own format, with what it has no place for in the tensors' header.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ditune.errors import UserError
from ditune.files.atomic import atomic, read_json, sha256, write_json
from ditune.peft import Adapters, PeftMethod, build_peft, from_peft_config
from ditune.peft.label_table import resize_labels
from ditune.peft.slots import all_or_nothing

FORMAT = "ditune-adapter-1"
RESHAPED = ("num_classes", "input_size", "pos_embed_scale")  # what an adapted network may have otherwise than its base


def save_adapter(network: nn.Module, folder: Path | str, base: dict[str, Any] | None = None, **facts: Any) -> None:
    """Write what trained of an adapted network.

    Args:
        network: with a method applied; its parameters as they are (inside `Ema.applied`: the average).
        folder: created if missing.
        base: file, sha256 and network (config) of the base network.
        facts: what else a reader should know: process, class_names, autoencoder, resolution, data.

    Raises:
        UserError: the network is not adapted.
    """
    method, folder = getattr(network, "adaptation", None), Path(folder)
    if method is None:
        raise UserError("The network is not adapted, so there is no adapter to save. Save it by save_network.")
    config, tensors = method.to_file(network)
    own = {"format": FORMAT, "network": network.config, "base": base, **facts}
    header = {"format": "pt"}
    if "peft_type" in config:
        config["base_model_name_or_path"] = base and base["file"]
        header["ditune"] = json.dumps(own)
    else:
        config = own | config
    with atomic(folder / "adapter_model.safetensors") as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=header)
    write_json(folder / "adapter_config.json", config)


def read_adapter(folder: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of an adapter, ours or peft's. Of peft's own files only the key "peft_config" is known.

    Raises:
        UserError: a file is missing, damaged, or of another format.
    """
    folder = Path(folder)
    path = folder / "adapter_model.safetensors"
    if not path.is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(f"{folder} holds a pickle, which could run any code. Save it again as safetensors, by peft.")
    for file in (folder / "adapter_config.json", path):
        if not file.is_file():
            raise UserError(f"{folder} holds no adapter: {file} is missing. Give a run's adapter/.")
    config = read_json(folder / "adapter_config.json")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            header = json.loads((file.metadata() or {}).get("ditune", "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"The adapter in {folder} is damaged ({error}). Train or copy it again.") from error
    if "peft_type" in config:
        return header | {"peft_config": config}, tensors
    if config.get("format") != FORMAT:
        raise UserError(f"{folder} has the adapter format {config.get('format')!r}, expected {FORMAT!r}.")
    return config, tensors


def load_adapter(network: nn.Module, folder: Path | str) -> PeftMethod:
    """Apply the adapter's method to a base network and load what it trained; returns the method.

    Raises:
        UserError: the adapter is damaged or was trained on another network; the network is as it was.
    """
    config, tensors = read_adapter(folder)
    check_network(network, config, folder)
    method = build_method(config, folder)
    with all_or_nothing(network):
        if _num_classes(network, config) != network.num_classes:
            resize_labels(network, _num_classes(network, config))
        method.apply(network)
        method.from_file(network, tensors)
    return method


def load_adapters(network: nn.Module, folders: dict[str, Path | str]) -> Adapters:
    """Several adapters beside each other on one base network, by name; none of them is in use yet.

    Raises:
        UserError: one of them is damaged or was trained on another network.
    """
    adapters = Adapters(network)
    for name, folder in folders.items():
        config, tensors = read_adapter(folder)
        check_network(network, config, folder)
        adapters.add(name, build_method(config, folder), tensors, _num_classes(network, config))
    return adapters


def build_method(config: dict[str, Any], folder: Path | str) -> PeftMethod:
    """The method of an adapter's config."""
    try:
        if "peft_config" in config:
            return from_peft_config(config["peft_config"])
        return build_peft(**config["peft"])
    except (KeyError, TypeError) as error:
        raise UserError(f"The adapter in {folder} has a method that this release does not know: {error}.") from error


def check_network(network: nn.Module, config: dict[str, Any], folder: Path | str) -> None:
    """Refuse an adapter of another base, as far as the adapter and the network say what they are.

    Raises:
        UserError: they differ.
    """
    if "network" not in config:
        return  # of peft's own making: only names and shapes of the tensors can tell
    ours, theirs, base = network.config, config["network"], config["base"] or {}
    expected = theirs | {"num_classes": base.get("network", theirs)["num_classes"]}
    if ours not in (expected, theirs):
        different = [f"{k} {expected.get(k)} (here {ours.get(k)})" for k in ours if ours.get(k) != expected.get(k)]
        raise UserError(
            f"The adapter in {folder} belongs to another network: {', '.join(different)}. "
            f"Load it onto its own base, {base.get('file')}."
        )
    file = getattr(network, "file", None)
    if file is not None:
        check_file(file, config, folder)


def check_file(file: Path, config: dict[str, Any], folder: Path | str) -> None:
    """Refuse an adapter of another base, by the base's file.

    Raises:
        UserError: its hash differs from the adapter's.
    """
    base = config.get("base") or {}
    if "sha256" in base and sha256(file) != base["sha256"]:
        raise UserError(
            f"{file} is another file than the base network {base['file']} that the adapter in {folder} was trained on. "
            "Give the right one (in a run: put it back, or correct `pretrained` in the run's config.yaml)."
        )


def _num_classes(network: nn.Module, config: dict[str, Any]) -> int:
    return config.get("network", network.config)["num_classes"]

"""Adapters as folders: `adapter_model.safetensors` holds what was trained, `adapter_config.json` names the base.

Methods of huggingface peft are written in peft's own format; other facts go into the header of the tensors' file.
"""

import json
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ditune.checkpoints.content_hash import KEY, content_hash
from ditune.errors import UserError
from ditune.files.atomic import atomic, read_json, sha256, write_json
from ditune.peft import Adapters, PeftMethod, build_peft, from_peft_config
from ditune.peft.label_table import resize_labels
from ditune.peft.slots import all_or_nothing, slots

log = logging.getLogger(__name__)

FORMAT = "ditune-adapter-1"
RANKS = ("r", "init_r", "bottleneck", "num_prompts")  # keys of methods that say how wide new layers are
RESHAPED = ("num_classes", "input_size", "pos_embed_scale")  # may differ between an adapted network and its base


def save_adapter(network: nn.Module, folder: Path | str, base: dict[str, Any] | None = None, **facts: Any) -> None:
    """Write the trained part of an adapted network.

    Args:
        network: with a method applied; its parameters are written as they are (inside `Ema.applied`: the EMA).
        folder: created if missing.
        base: file, sha256 and network (config) of the base network.
        facts: further facts for readers: process, class_names, autoencoder, resolution, data.

    Raises:
        UserError: the network is not adapted.
    """
    method, folder = getattr(network, "adaptation", None), Path(folder)
    if method is None:
        raise UserError("The network is not adapted, so there is no adapter to save. Save it by save_network.")
    config, tensors = method.to_file(network)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    own = {"format": FORMAT, "network": network.config, "base": base, **facts}
    # what stands in JSON is for people to read and to mend, such as the place of the base
    own[KEY] = content_hash(tensors, own if "peft_type" in config else {})
    header = {"format": "pt"}
    if "peft_type" in config:
        config["base_model_name_or_path"] = base and base["file"]
        header["ditune"] = json.dumps(own)
    else:
        config = own | config
    with atomic(folder / "adapter_model.safetensors") as temporary:
        save_file(tensors, temporary, metadata=header)
    write_json(folder / "adapter_config.json", config)


def read_adapter(folder: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an adapter of ours or of peft.

    Args:
        folder: of the adapter.

    Returns:
        (config, tensors). The config of an adapter that peft itself has written has only the key "peft_config".

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
    facts = header if "peft_type" in config else {}
    written = (facts or config).pop(KEY, None)  # earlier versions and peft write none
    if written not in (None, content_hash(tensors, facts)):
        raise UserError(
            f"{path} is damaged: its content has another hash than the one that was written with it. Copy the adapter "
            "again, or train it again."
        )
    if "peft_type" in config:
        return header | {"peft_config": config}, tensors
    if config.get("format") != FORMAT:
        raise UserError(f"{folder} has the adapter format {config.get('format')!r}, expected {FORMAT!r}.")
    return config, tensors


def load_adapter(network: nn.Module, folder: Path | str, keep_base: bool = False) -> PeftMethod:
    """Apply the adapter's method to a base network and load its tensors.

    Args:
        network: the base; changed in place.
        folder: of the adapter.
        keep_base: whether `method.dial` can lead back to the base, which the adapter's own weights then do not replace.

    Returns:
        The method.

    Raises:
        UserError: the adapter is damaged or was trained on another network; the network is as it was.
    """
    config, tensors = read_adapter(folder)
    return apply_adapter(network, config, tensors, folder, keep_base)


def apply_adapter(
    network: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path | str, keep_base: bool = False
) -> PeftMethod:
    """Apply an adapter that has been read, see `load_adapter`.

    Args:
        network: the base; changed in place.
        config, tensors: of the adapter.
        folder: of the adapter, for messages.
        keep_base: see `load_adapter`.

    Raises:
        UserError: see `load_adapter`.
    """
    check_network(network, config, folder)
    check_rank(network, config, tensors, folder)
    method = build_method(config, folder)
    before = slots(network) if keep_base else None
    new_classes = (config.get("base") or {}).get("classes") is not None
    with all_or_nothing(network):
        if _num_classes(network, config) != network.num_classes:
            resize_labels(network, _num_classes(network, config))
        method.apply(network, before, new_classes)
        method.from_file(network, tensors)
    if keep_base:
        method.dial.masked = masked_by(config)
    return method


def masked_by(config: dict[str, Any]) -> tuple[str, ...]:
    """Names of the parameters that an adapter's config says to have a pattern of zeros."""
    return tuple((config.get("sparsity") or {}).get("zeros", {}))


def load_adapters(network: nn.Module, folders: dict[str, Path | str]) -> Adapters:
    """Load several adapters onto one base network; none of them is active yet.

    Args:
        network: the base.
        folders: of the adapters, by the name that each one gets.

    Returns:
        The adapters, to switch between.

    Raises:
        UserError: one of them is damaged or was trained on another network.
    """
    adapters = Adapters(network)
    for name, folder in folders.items():
        config, tensors = read_adapter(folder)
        check_network(network, config, folder)
        check_rank(network, config, tensors, folder)
        adapters.add(name, build_method(config, folder), tensors, _num_classes(network, config))
    return adapters


def build_method(config: dict[str, Any], folder: Path | str) -> PeftMethod:
    """The method of an adapter.

    Args:
        config: of the adapter, by `read_adapter`.
        folder: of the adapter, for messages.

    Raises:
        UserError: this release does not know the method.
    """
    try:
        if "peft_config" in config:
            return from_peft_config(config["peft_config"])
        return build_peft(**config["peft"])
    except (KeyError, TypeError) as error:
        raise UserError(f"The adapter in {folder} has a method that this release does not know: {error}.") from error


def check_network(network: nn.Module, config: dict[str, Any], folder: Path | str) -> None:
    """Refuse an adapter of another base network, by config and, if the network has one, by file.

    Args:
        network: the base that the adapter would be applied to.
        config: of the adapter, by `read_adapter`.
        folder: of the adapter, for messages.

    Raises:
        UserError: the adapter was trained on another network.
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
    if "sha256" not in base:
        log.warning(
            "the adapter in %s does not say which base file it was trained on: it is loaded onto any network of this "
            "shape. Make sure that it is the right one",
            folder,
        )
    file = getattr(network, "file", None)
    if file is not None:
        check_file(file, config, folder)


def check_rank(network: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path | str) -> None:
    """Refuse an adapter whose config asks for new layers that neither the network nor its own tensors can have.

    Args:
        network: the base that the adapter would be applied to.
        config: of the adapter, by `read_adapter`.
        tensors: of the adapter.
        folder: of the adapter, for messages.

    Raises:
        UserError: a rank is larger than every side of the tensors and of the network's layers.
    """
    method = config.get("peft_config") or config.get("peft") or {}
    pattern = method.get("rank_pattern")
    ranks = {key: method.get(key) for key in RANKS} | (pattern if isinstance(pattern, dict) else {})
    sides = [side for tensor in (*tensors.values(), *network.parameters()) for side in tensor.shape]
    for key, rank in ranks.items():
        if isinstance(rank, int | float) and rank > max(sides, default=0):
            raise UserError(
                f"The adapter in {folder} asks for {key}={rank:,}, and the widest layer here has {max(sides)} values. "
                "Its adapter_config.json is damaged or hostile: copy the adapter again."
            )


def check_file(file: Path, config: dict[str, Any], folder: Path | str) -> None:
    """Refuse an adapter of another base, by the hash of the base's file.

    Args:
        file: of the base network.
        config: of the adapter, by `read_adapter`.
        folder: of the adapter, for messages.

    Raises:
        UserError: the file has another hash than the adapter names.
    """
    base = config.get("base") or {}
    if "sha256" in base and sha256(file) != base["sha256"]:
        raise UserError(
            f"{file} is another file than the base network {base['file']} that the adapter in {folder} was trained on. "
            "Give the right one (in a run: put it back, or correct `pretrained` in the run's config.yaml)."
        )


def _num_classes(network: nn.Module, config: dict[str, Any]) -> int:
    return config.get("network", network.config)["num_classes"]

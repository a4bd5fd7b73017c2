"""Networks as files: ours (safetensors that explain themselves), and those of others, one module for each format."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.torch import save_file
from torch import nn

from ditune.errors import UserError
from ditune.networks import CLASSES, DiT
from ditune.networks.dit_moe import of_earlier_release

from . import diffusers_dit, official_dit, official_dit_moe, shortcut_jax
from .files import atomic
from .published import locate
from .source import Content, Source

FORMAT = "ditune-network-1"
# The formats of others, asked in this order. Each module has `recognises(source)`, `read(source, **overrides)`, and
# what the files leave unsaid: `process(source)` and `drawing(source)`.
FOREIGN: tuple[ModuleType, ...] = (shortcut_jax, diffusers_dit, official_dit, official_dit_moe)


def save_network(
    path: Path | str, network: DiT, process: dict, *, position_table: bool = False, **provenance: Any
) -> None:
    """Write weights in fp32; the configs of network and process, and `provenance`, go into the header.

    Args:
        path: `.safetensors` file to write.
        network: a plain network (merge an adapter first).
        process: config of the process that the network was trained for.
        position_table: the computed table is stored too, as other readers of DiT's keys expect it.
        provenance: what else a reader should know: class names, training set, steps, metrics.
    """
    header = {"format": FORMAT, "class": type(network).__name__, "network": network.config, "process": process}
    header["provenance"] = provenance
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in network.state_dict().items()}
    if not position_table:
        tensors.pop("pos_embed", None)  # computed from the config
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"ditune": json.dumps(header)})


def read_header(path: Path | str) -> dict:
    """Header of one of our network files: keys format, network, process, provenance.

    Raises:
        UserError: the file is missing, damaged, or not one of ours.
    """
    source = Source(path)
    try:
        header = json.loads(source.header.get("ditune", "{}"))
    except json.JSONDecodeError as error:
        raise source.damaged(error) from error
    if header.get("format") != FORMAT:
        raise UserError(f"{path} is no network file of this project. Give one written by save_network.")
    return header


def is_ours(path: Path | str) -> bool:
    """True for a file by `save_network`, whose header says what the others leave unsaid."""
    return "ditune" in Source(path).header


def load_network(path: Path | str, **overrides: Any) -> nn.Module:
    """Build the network that a file holds, with its weights.

    Args:
        path: our `.safetensors`; an official `.pt` of DiT or DiT-MoE (bare, or with "ema" or "model" inside, "ema"
            first); a folder of diffusers' DiTTransformer2DModel or DiTPipeline; a pickle of the shortcut models' code
            (its average).
        overrides: constructor arguments that replace those of the file. `input_size` is for another resolution. With
            `step` a network learns to be told steps, which it begins by ignoring.

    Raises:
        UserError: the file is missing, damaged, of an unknown kind, or does not fit the overrides.
    """
    source = Source(path)
    content = _content(source, **overrides)
    network = content.build(**(content.config | overrides))
    tensors = content.tensors
    if overrides.get("step") and not content.config.get("step"):
        network.ignore_step_at_first()
        own = network.state_dict()
        tensors = tensors | {name: value for name, value in own.items() if name.startswith(network.fresh)}
    try:
        network.load_state_dict(tensors)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} does not fit the network: {error}. Check the overrides {overrides}.") from error
    network.file = source.path
    return network


def network_like(name: str, checkpoint: str | None, cache_dir: str, **overrides: Any) -> nn.Module:
    """An untrained network of the file's kind and sizes, for `network=as_pretrained`.

    Args:
        name: of the config; nothing depends on it.
        checkpoint: the file, or the name of a published one.
        cache_dir: folder of published ones.
        overrides: constructor arguments that replace those of the file.

    Raises:
        UserError: no file is given, or it cannot be read.
    """
    if checkpoint is None:
        raise UserError("network=as_pretrained takes its sizes from a file. Set pretrained=<file> or another network=.")
    content = _content(Source(locate(checkpoint, cache_dir)), **overrides)
    return content.build(**(content.config | overrides))


def _content(source: Source, **overrides: Any) -> Content:
    if "ditune" not in source.header:
        return _format_of(source).read(source, **overrides)
    header = read_header(source.path)
    kind = header.get("class", "DiT")  # files from before there was more than DiT say none
    if kind not in CLASSES:
        raise UserError(f"{source.path} holds a {kind}, which this release does not know. Use a newer one.")
    return Content(CLASSES[kind], of_earlier_release(header["network"]), source.content)


def foreign_process(path: Path | str) -> dict[str, Any]:
    """Config of the process that a file of others is for, by the code that it comes from; {} = DiT's own diffusion."""
    return _format_of(Source(path)).process(Source(path))


def foreign_drawing(path: Path | str) -> dict[str, Any]:
    """Steps and guidance that the authors of a file of others draw with, keys as in configs/sampler/."""
    return _format_of(Source(path)).drawing(Source(path))


def _format_of(source: Source) -> ModuleType:
    found = next((module for module in FOREIGN if module.recognises(source)), None)
    if found is None:
        known = ", ".join(module.__name__.rpartition(".")[2] for module in FOREIGN)
        raise UserError(
            f"{source.path} is of no kind that is known ({known}, and this project's own). "
            "An official DiT file has x_embedder.proj.weight; a folder of diffusers has a config.json."
        )
    return found

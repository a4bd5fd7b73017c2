"""Networks as files: our own (safetensors with a header), and foreign ones, with one module for each format."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors.torch import save_file
from torch import nn

from ditune.checkpoints import diffusers_dit, official_dit, official_dit_moe, shortcut_jax
from ditune.checkpoints.content_hash import KEY, content_hash
from ditune.checkpoints.loading import build
from ditune.checkpoints.published import locate
from ditune.checkpoints.source import Content, Source
from ditune.checkpoints.unknown import refuse_ours, unknown
from ditune.errors import UserError
from ditune.files.atomic import atomic
from ditune.networks import CLASSES, DiT
from ditune.networks.dit_moe import of_earlier_release

log = logging.getLogger(__name__)

FORMAT = "ditune-network-1"
KEYS = {"format", "class", "network", "process", "provenance"}  # of a header from before there was a hash
# The foreign formats, asked in this order. Each module has a TITLE, the HEADS of published files if shapes do not tell
# them, `recognises(source)`, `read(source, known, **overrides)`, `process(source)` (None = the file does not say), and
# `sampling(process, config)`: the sampler settings of its authors.
FOREIGN: tuple[ModuleType, ...] = (shortcut_jax, diffusers_dit, official_dit, official_dit_moe)
# What a foreign file can be read as; {} is DiT's own diffusion, which predicts epsilon.
PROCESSES: dict[str, dict[str, Any]] = {"diffusion": {}, "sit": official_dit.SIT, "repa": official_dit.REPA}
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


@dataclass(frozen=True)
class NetworkFile:
    """A network file that has been read.

    Args:
        network: with the file's weights.
        header: of our own file; None = a foreign file.
        process: config of the process that the network is for; {} = DiT's own diffusion.
        sampling: sampler settings of the authors of a foreign file, keys as in configs/sampler/.
    """

    network: nn.Module
    header: dict[str, Any] | None
    process: dict[str, Any]
    sampling: dict[str, Any]

    @property
    def drawing(self) -> dict[str, Any]:
        """Earlier name of `sampling`."""
        return self.sampling


def save_network(
    path: Path | str, network: DiT, process: dict, *, position_table: bool = False, **provenance: Any
) -> None:
    """Write weights in fp32; the configs of network and process, and `provenance`, go into the header,
    and a hash of all that.

    Args:
        path: `.safetensors` file to write.
        network: a plain network (merge an adapter first).
        process: config of the process that the network was trained for.
        position_table: also store the computed table, which other readers of DiT's keys expect.
        provenance: further facts for readers: class names, training set, steps, metrics.

    Raises:
        OSError: the file cannot be written.
    """
    header = {"format": FORMAT, "class": network.kind, "network": network.config, "process": process}
    header["provenance"] = provenance
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in network.state_dict().items()}
    if not position_table:
        tensors.pop("pos_embed", None)  # computed from the config
    header[KEY] = content_hash(tensors, header)
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={"ditune": json.dumps(header)})


def read_header(path: Path | str | Source) -> dict:
    """Header of one of our network files: keys format, network, process, provenance.

    Raises:
        UserError: the file is missing, damaged, or not one of ours.
    """
    source = path if isinstance(path, Source) else Source(path)
    try:
        header = json.loads(source.header.get("ditune", "{}"))
    except json.JSONDecodeError as error:
        raise source.damaged(error) from error
    if header.get("format") != FORMAT:
        raise UserError(f"{source.path} is no network file of this project. Give one written by save_network.")
    if KEY not in header and header.keys() - KEYS:
        raise source.damaged("its header has entries that nobody writes")
    return header


def is_ours(path: Path | str | Source) -> bool:
    """Whether `save_network` has written this file."""
    source = path if isinstance(path, Source) else Source(path)
    return "ditune" in source.header or any(FORMAT in text for text in source.header.values())


def load_network(path: Path | str, known: Mapping[str, Any] | None = None, **overrides: Any) -> nn.Module:
    """Build the network that a file holds, with its weights in fp32.

    Args:
        path: our `.safetensors`; a `.pt` or `.safetensors` with the keys of DiT or DiT-MoE, whatever containers and
            prefixes are around them (an EMA is preferred); a folder of such files with an index; a folder of
            diffusers' DiTTransformer2DModel or DiTPipeline; a pickle of the shortcut models' code (its EMA).
        known: config of a network that is known to be of this kind; used only for what the file cannot tell.
        overrides: constructor arguments that replace those of the file. `input_size` is for another resolution.
            `step=True` adds a zero-initialised step embedding to a network that has none.

    Returns:
        The network; its attribute `file` is the path.

    Raises:
        UserError: the file is missing, damaged, of an unknown kind, or does not fit the overrides.
    """
    return build(Source(path), lambda source: _content(source, known or {}, **overrides), overrides)


def read_network(
    path: Path | str | Source,
    process: str | Mapping[str, Any] | None = None,
    known: Mapping[str, Any] | None = None,
    key: str = "process",
    later: bool = False,
    **overrides: Any,
) -> NetworkFile:
    """Read a network together with its header, process and sampler settings; the log says how a foreign file was read.

    Args:
        path: as in `load_network`, or the file already opened.
        process: what a foreign file is for: one of `PROCESSES`, or a config of ditune.processes. None = as the file
            says, else as the authors of its format train.
        known: as in `load_network`.
        key: config key that sets `process`, for messages.
        later: the blocks' weights are read when the network is cut, see `ditune.checkpoints.loading.build`.
        overrides: as in `load_network`.

    Raises:
        UserError: as in `load_network`; or the process is unknown, or is given for a file of our own.
    """
    source = path if isinstance(path, Source) else Source(path)
    if is_ours(source):
        if process is not None:
            raise UserError(f"{source.path} says itself what it was trained on. Leave {key}=null.")
        header = read_header(source)
        network = build(source, lambda opened: _content(opened, known or {}, **overrides), overrides, later)
        return NetworkFile(network, header, header["process"], {})
    module = _format_of(source)
    network = build(source, lambda opened: module.read(opened, known or {}, **overrides), overrides, later)
    config, how = _process(source, module, network, process, key)
    log.info("read %s: %s", source.path, _summary(source, module, network, f"{name_of(config)} ({how})"))
    if how == "assumed":
        _warn(source, key)
    return NetworkFile(network, None, config, module.sampling(config, network.config))


def network_like(
    name: str, checkpoint: str | None, cache_dir: str, source: Source | None = None, **overrides: Any
) -> nn.Module:
    """An untrained network of the file's kind and sizes, for `network=as_pretrained`.

    Args:
        name: of the config; nothing depends on it.
        checkpoint: the file, or the name of a published one.
        cache_dir: folder of published ones.
        source: the file, if it has been opened already.
        overrides: constructor arguments that replace those of the file.

    Raises:
        UserError: no file is given, or it cannot be read.
    """
    if checkpoint is None:
        raise UserError("network=as_pretrained takes its sizes from a file. Set pretrained=<file> or another network=.")
    content = _content(source or Source(locate(checkpoint, cache_dir)), {}, **overrides)
    return content.build(**(content.config | overrides))


def foreign_process(path: Path | str) -> dict[str, Any]:
    """Config of the process that a foreign file is for; {} = DiT's own diffusion.

    Raises:
        UserError: the file is missing, damaged or of an unknown kind.
    """
    source = Source(path)
    return _format_of(source).process(source) or {}


def name_of(process: Mapping[str, Any]) -> str:
    """Name of a process in messages.

    Args:
        process: config of the process.
    """
    if process.get("kind") != "flow":
        return f"{process.get('prediction', 'epsilon')} diffusion"
    return f"flow with times up to {process.get('time_scale', 1000.0):g} and data at {process.get('data_at', 0)}"


def _content(source: Source, known: Mapping[str, Any], **overrides: Any) -> Content:
    if not is_ours(source):
        return _format_of(source).read(source, known, **overrides)
    header = read_header(source)
    kind = header.get("class", "DiT")  # files from before there was more than DiT say none
    if kind not in CLASSES:
        raise UserError(f"{source.path} holds a {kind}, which this release does not know. Use a newer one.")
    facts = header if KEY in header else {}  # files of earlier versions have no hash
    return Content(CLASSES[kind], of_earlier_release(header["network"]), source.content, facts)


def _format_of(source: Source) -> ModuleType:
    refuse_ours(source)
    found = next((module for module in FOREIGN if module.recognises(source)), None)
    if found is None:
        raise unknown(source, [module.TITLE for module in FOREIGN])
    return found


def _process(
    source: Source, module: ModuleType, network: nn.Module, given: str | Mapping[str, Any] | None, key: str
) -> tuple[dict[str, Any], str]:
    """Process of a foreign file, and who says so."""
    if isinstance(given, Mapping):
        return dict(given), f"by {key}="
    if given is not None:
        if given not in PROCESSES:
            raise UserError(f"{key} is {given!r}. Choose one of {', '.join(PROCESSES)}, or give a process's config.")
        return _for_outputs(PROCESSES[given], network), f"by {key}="
    said = module.process(source)
    return (_for_outputs({}, network), "assumed") if said is None else (said, "as the file says")


def _for_outputs(process: dict[str, Any], network: nn.Module) -> dict[str, Any]:
    """DiT's diffusion; a network without learned variance gets the fixed one of DiT's code."""
    return process or ({} if network.config["learn_sigma"] else {"variance": "fixed_large"})


def _summary(source: Source, module: ModuleType, network: nn.Module, process: str) -> str:
    config, found = network.config, source.state_dict
    dtypes = sorted({DTYPES.get(str(v.dtype)[6:], str(v.dtype)) for v in source.tensors.values()}) or ["fp32"]
    facts = [
        module.TITLE,
        f"hidden {config['hidden_size']}, depth {config['depth']}, {config['num_heads']} heads",
        f"{config['num_classes']} classes" + (" + null class" if config["class_dropout_prob"] > 0 else ""),
        process,
        *([f"from '{found.where}'"] if found and found.where else []),
        ", ".join(dtypes) + ("" if dtypes == ["fp32"] else " (computed in fp32)"),
    ]
    return ", ".join(facts)


def _warn(source: Source, key: str) -> None:
    """Log the guess at every use, and as a warning if the path's name contradicts it."""
    words = {word for part in source.path.parts[-3:] for word in re.findall(r"[a-z]+", part.lower())}
    for name in ("sit", "repa"):
        if name in words:
            log.warning("%s has %r in its name: if it is one, set %s=%s", source.path, name, key, name)
            return
    log.info(
        "%s is read as DiT's epsilon diffusion, since the file does not say; for a SiT file set %s=sit, for one of "
        "REPA %s=repa",
        source.path.name,
        key,
        key,
    )

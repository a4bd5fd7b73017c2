"""Network files that are made from another one without training."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from ditune.checkpoints import is_ours, locate, read_header, save_network
from ditune.errors import UserError
from ditune.files.atomic import sha256
from ditune.run import Trained, load_checkpoint


def read_original(cfg: DictConfig) -> tuple[Trained, Path, Path]:
    """What `cfg.checkpoint` holds, its path, and the path that `cfg.out` names.

    Raises:
        UserError: the file or the settings are wrong.
    """
    out = Path(cfg.out).expanduser()
    if out.suffix != ".safetensors":
        raise UserError(f"out is {out}, but networks are written as safetensors. Set out=<file>.safetensors.")
    path = locate(cfg.checkpoint, Path(cfg.paths.cache_dir) / "networks")
    original = load_checkpoint(path, cfg.autoencoder, cfg.sampler, False, cfg.process, cfg.network_overrides)
    return original, path, out


def save_derived(out: Path, network: nn.Module, original: Trained, path: Path, how: str, **facts: Any) -> None:
    """Write a network with the facts of its original.

    Args:
        out: file to write.
        network: made from that of `original`.
        original, path: see `read_original`.
        how: key of the original's file in the header, such as "pruned_from".
        facts: further ones.
    """
    known = read_header(path)["provenance"] if is_ours(path) else {}
    known |= {
        "class_names": original.class_names,
        "autoencoder": original.generator.autoencoder.latent_fingerprint,
        "autoencoder_name": original.generator.autoencoder.name,
        "resolution": original.generator.resolution,
        how: {"file": path.name, "sha256": sha256(path)},
    }
    save_network(out, network, original.generator.process.config, **known, **facts)

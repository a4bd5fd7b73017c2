"""A network file with experts from a dense one."""

import logging
from pathlib import Path

from omegaconf import DictConfig

from ditune.checkpoints import is_ours, locate, read_header, save_network
from ditune.errors import UserError
from ditune.files.atomic import sha256
from ditune.moe.upcycling import upcycle
from ditune.networks import DiTMoE
from ditune.run import load_checkpoint

log = logging.getLogger(__name__)


def upcycle_file(cfg: DictConfig) -> Path:
    """Read `cfg.checkpoint`, upcycle it, write `cfg.out`.

    Raises:
        UserError: the file or the settings are wrong.
    """
    out = Path(cfg.out).expanduser()
    if out.suffix != ".safetensors":
        raise UserError(f"out is {out}, but networks are written as safetensors. Set out=<file>.safetensors.")
    path = locate(cfg.checkpoint, Path(cfg.paths.cache_dir) / "networks")
    trained = load_checkpoint(path, cfg.autoencoder, cfg.sampler, False, cfg.process, cfg.network_overrides)
    options = {} if isinstance(trained.network, DiTMoE) else dict(cfg.options)
    made = upcycle(trained.network, cfg.num_experts, cfg.top_k, cfg.seed, cfg.noise, **options)
    facts = read_header(path)["provenance"] if is_ours(path) else {}
    facts |= {
        "class_names": trained.class_names,
        "autoencoder": trained.generator.autoencoder.latent_fingerprint,
        "autoencoder_name": trained.generator.autoencoder.name,
        "resolution": trained.generator.resolution,
        "upcycled_from": {"file": path.name, "sha256": sha256(path)},
    }
    save_network(out, made, trained.generator.process.config, **facts)
    before, after = (sum(p.numel() for p in network.parameters()) for network in (trained.network, made))
    log.info("%s: %s parameters, %s before", out, f"{after:,}", f"{before:,}")
    log.info("train on from it with network=as_pretrained pretrained=%s balance=batch peft=full", out)
    return out

"""A network file with experts from a dense one."""

import logging
from pathlib import Path

from omegaconf import DictConfig

from ditune.commands.derived import read_original, save_derived
from ditune.moe.upcycling import upcycle
from ditune.networks import DiTMoE

log = logging.getLogger(__name__)


def upcycle_file(cfg: DictConfig) -> Path:
    """Read `cfg.checkpoint`, upcycle it, write `cfg.out`.

    Raises:
        UserError: the file or the settings are wrong.
    """
    original, path, out = read_original(cfg)
    options = {} if isinstance(original.network, DiTMoE) else dict(cfg.options)
    made = upcycle(original.network, cfg.num_experts, cfg.top_k, cfg.seed, cfg.noise, **options)
    save_derived(out, made, original, path, "upcycled_from")
    before, after = (sum(p.numel() for p in network.parameters()) for network in (original.network, made))
    log.info("%s: %s parameters, %s before", out, f"{after:,}", f"{before:,}")
    log.info("train on from it with network=as_pretrained pretrained=%s balance=batch peft=full", out)
    return out

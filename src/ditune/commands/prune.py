"""A network file with zeros, or with fewer blocks, from another one, once and without training."""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from ditune.checkpoints.shallower import shallower
from ditune.commands.derived import read_original, save_derived
from ditune.errors import UserError
from ditune.run import Trained
from ditune.training.masks import chosen, masks, parsed, zeros

log = logging.getLogger(__name__)


def prune_file(cfg: DictConfig) -> Path:
    """Read `cfg.checkpoint`, set its smallest weights to zero or leave out whole blocks, write `cfg.out`.

    Raises:
        UserError: the file or the settings are wrong.
    """
    original, path, out = read_original(cfg)
    if cfg.depth is not None:
        return save_shallower(cfg, original, path, out)
    sparsity = prune(original.network, cfg.pattern, cfg.target, cfg.share, cfg.scope)
    save_derived(out, original.network, original, path, "pruned_from", sparsity=sparsity)
    count = sum(sparsity["zeros"].values())
    total = sum(p.numel() for p in original.network.parameters())
    log.info("%s: %s of %s parameters are zero", out, f"{count:,}", f"{total:,}")
    log.info("train on from it with pretrained=%s and the network= of before", out)
    return out


def save_shallower(cfg: DictConfig, original: Trained, path: Path, out: Path) -> Path:
    """Write the network of `cfg.depth` blocks."""
    made = shallower(original.network, cfg.depth)
    save_derived(out, made, original, path, "pruned_from")
    log.info("%s: %s of %s blocks", out, len(made.blocks), len(original.network.blocks))
    log.info("train on from it with network=as_pretrained pretrained=%s objective.teacher=%s", out, cfg.checkpoint)
    return out


@torch.no_grad()
def prune(network: nn.Module, pattern: str, target: str | None, share: float, scope: str) -> dict[str, Any]:
    """Set the smallest weights of a network to zero.

    Args:
        network: changed in place.
        pattern, target, scope: see `ditune.training.sparsity.Sparsity`.
        share: of 'unstructured': the share that becomes zero, in [0, 1).

    Returns:
        What the file says of it, as `Sparsity.facts`.

    Raises:
        UserError: no parameter matches, or a shape does not suit the pattern.
    """
    structure = parsed(pattern, "pattern")
    weights = chosen(dict(network.named_parameters()), target, None if structure is None else structure[1])
    for name, mask in masks(weights, share if structure is None else structure, scope).items():
        weights[name] *= mask
    return {"pattern": pattern, "zeros": zeros(weights)}


def refuse_filled(network: nn.Module, sparsity: dict[str, Any] | None, what: str, fill_zeros: bool) -> bool:
    """Refuse a merged network whose zeros are gone.

    Args:
        network: without adapter.
        sparsity: what the file says of the zeros that it had, see `prune`; None = it has none.
        what: was merged, for the message.
        fill_zeros: the user knows it.

    Returns:
        Whether the zeros are there.

    Raises:
        UserError: some are gone, and `fill_zeros` is false.
    """
    if not sparsity:
        return False
    before = sparsity["zeros"]
    parameters = dict(network.named_parameters())
    after = zeros({name: parameters[name] for name in before if name in parameters})
    gone = sum(max(before[name] - count, 0) for name, count in after.items())
    if gone and not fill_zeros:
        raise UserError(
            f"Merging {what} would fill {gone:,} of the base's {sum(before.values()):,} zeros. Set fill_zeros=true to "
            "export a dense network, or keep the adapter beside its base; peft=difffit, bitfit and norm fill none."
        )
    if gone:
        log.warning("merging %s has filled %s of %s zeros", what, f"{gone:,}", f"{sum(before.values()):,}")
    return bool(after) and not gone

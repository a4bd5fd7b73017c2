"""Federated averaging, simulated: the ordinary training is each client's, and a server merges between its steps.

A client is a run folder. A round trains it to a later step, as a run that goes on does, from a checkpoint into which
the server has written the weights of all. The optimizer's state stays with the client.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from ditune.commands.train import train
from ditune.config.components import build_components
from ditune.config.instantiate import instantiate, refuse_missing
from ditune.config.keys import APART, check, leaves
from ditune.config.sharded import is_sharded
from ditune.config.training import resume_key
from ditune.errors import UserError
from ditune.files.atomic import atomic, read_json, write_json
from ditune.training.checkpoint_io import (
    checkpoint_path,
    checkpoints_in,
    read_checkpoint,
    read_whole,
    step_of,
    unreadable,
)
from ditune.training.components import Components
from ditune.training.federation import Weights, next_weights
from ditune.training.sharded_checkpoint import Unusable
from ditune.training.sparsity import Sparsity

log = logging.getLogger(__name__)

FACTS = "federation.json"  # in the folder: what was merged, round by round
LAST = "merged.pt"  # likewise: the weights of all after the last round that is done
PREFIX = "network."  # of the names in a checkpoint's state_dict


def federate(cfg: DictConfig) -> int:
    """Train `cfg.clients` clients for `cfg.rounds` rounds, then save and evaluate what they have in common.

    Returns:
        The exit code: that of a training which a signal has stopped, else 0. The same command goes on.

    Raises:
        UserError: the config is wrong, or its training cannot be merged.
    """
    check(cfg, "federate")
    refuse_missing(cfg)
    folder = Path(cfg.paths.output_dir)
    of_training = trained_as(cfg)
    refuse(cfg)
    if cfg.dry_run:
        return train(client_config(cfg, of_training, folder, 0))
    key, sparsity = key_of_all(of_training), instantiate(cfg.get("sparsity"), "sparsity")
    length = cfg.max_steps // cfg.rounds
    merged, done = read_merged(folder, cfg)
    for number in range(done + 1, cfg.rounds + 1):
        step = number * length
        for client in range(cfg.clients):
            config = client_config(cfg, of_training, folder, client)
            code = train_client(config, merged, step - length, step)
            if code:
                return code
        merged = merge_clients(cfg, folder, sparsity, step)
        write_merged(folder, merged, number, cfg, sparsity)
    code = evaluate_all(of_training, folder, merged, key)
    if not code:
        log.info("what the clients have in common is in %s", folder / "global")
    return code


def trained_as(cfg: DictConfig) -> DictConfig:
    """The config of an ordinary training of the same length, where nothing refers to `max_steps` any more."""
    cfg = cfg.copy()
    with open_dict(cfg):
        for row in APART["federate"]:
            cfg.pop(row.pattern, None)
        for name, parent, key in list(leaves(cfg)):  # schedules are of the whole training, and rounds end earlier
            refers = OmegaConf.is_interpolation(parent, key) and OmegaConf.to_container(parent)[key] == "${max_steps}"
            if refers and not name.startswith("trainer."):
                parent[key] = parent[key]
        cfg.trainer.devices = 1
        if cfg.get("sparsity") is not None:  # the server purges, and hands out its masks
            cfg.sparsity.schedule, cfg.sparsity.start = "constant", 2 * cfg.max_steps
    return cfg


def refuse(cfg: DictConfig) -> None:
    """Refuse what has a state besides weights, or no steps that rounds could share.

    Raises:
        UserError: names the key and what to set.
    """
    if cfg.max_steps % cfg.rounds:
        raise UserError(
            f"max_steps is {cfg.max_steps}, which {cfg.rounds} rounds do not share evenly. Set a multiple of rounds=."
        )
    if is_sharded(cfg) or cfg.trainer.get("num_nodes", 1) > 1 or cfg.trainer.devices not in (1, "auto", [0]):
        raise UserError("The clients of a simulation train one after another in one process. Set trainer.devices=1.")
    if cfg.callbacks.checkpoint.best is not None:
        raise UserError("A server merges the last weights of its clients. Set callbacks.checkpoint.best=null.")
    sparsity = cfg.get("sparsity")
    if sparsity is not None and sparsity.way != "hard":
        raise UserError(
            f"sparsity.way is {sparsity.way}, and a server keeps no dense weights behind its masks. Set "
            "sparsity.way=hard."
        )


def key_of_all(cfg: DictConfig) -> dict[str, Any]:
    """What a checkpoint of the training on all images must say of itself.

    Raises:
        UserError: the training has a state that is no mean of its clients' states.
    """
    c: Components = build_components(cfg)
    objective = type(c.objective).__name__
    if c.objective.has_teacher or c.objective.scheduled:
        raise UserError(
            f"{objective} has a teacher or a schedule over the whole training, which rounds would cut. Set "
            "objective=diffusion, diffusion_v or flow_matching, without schedules of transfer= or patches=."
        )
    if c.balance is not None and c.balance.bias_rate:
        raise UserError(
            "balance.bias_rate moves biases of the routers, which are no weights to be merged. Set balance.bias_rate=0."
        )
    if c.method.training_state():
        raise UserError(f"peft={c.method.title} has a state besides its weights. Choose another method, such as lora.")
    return resume_key(cfg, c)


def client_config(cfg: DictConfig, of_training: DictConfig, folder: Path, client: int) -> DictConfig:
    """A client's own training: on its share of the images, evaluated by nobody."""
    config = of_training.copy()
    with open_dict(config):
        config.paths.output_dir = str(folder / f"client_{client}")
        if cfg.clients > 1:
            config.data.subset = {"client": client, "clients": cfg.clients, "by": cfg.share_by, "seed": cfg.seed}
        config.metrics.n, config.metrics.loss_split = 0, None
        config.callbacks.samples.n = 0
        config.callbacks.checkpoint.keep_finished = True
        config.callbacks.checkpoint.every_n_steps = config.callbacks.checkpoint.every_n_steps or cfg.max_steps
    return config


def train_client(config: DictConfig, merged: Weights | None, begin: int, end: int) -> int:
    """A client's part of a round; returns the exit code.

    Args:
        config: of the client.
        merged: the weights of all, None in the first round.
        begin, end: steps of the training.
    """
    checkpoints = Path(config.paths.output_dir) / "checkpoints"
    newest = max((step_of(path) for path in checkpoints_in(checkpoints) if unreadable(path) is None), default=0)
    if newest >= end:
        return 0  # an earlier start of this command has trained it
    if newest < begin:
        raise UserError(
            f"{checkpoints} has lost the checkpoint of step {begin}, from which its client goes on. Copy it back, or "
            "choose another run_dir."
        )
    if merged is not None and newest == begin:
        write_into(checkpoint_path(checkpoints, begin), checkpoint_path(checkpoints, begin), merged)
    config.max_steps, config.resume = end, "auto" if newest else None
    return train(config)


def merge_clients(cfg: DictConfig, folder: Path, sparsity: Sparsity | None, step: int) -> Weights:
    """The weights of all, of the clients' checkpoints at a step."""
    clients, factors = [], []
    for client in range(cfg.clients):
        path = folder / f"client_{client}"
        if not checkpoint_path(path / "checkpoints", step).exists():
            raise UserError(f"The client in {path} has left no checkpoint of step {step}. Free some space and go on.")
        content = read_checkpoint(checkpoint_path(path / "checkpoints", step))
        values = {name.removeprefix(PREFIX): value for name, value in content["state_dict"].items()}
        clients.append(Weights(values, content["ema"], content.get("sparsity", {}).get("masks", {})))
        factors.append(read_json(path / "result.json")["data"]["n"])
    return next_weights(clients, factors, cfg.merge, cfg.purge, sparsity, step)


def write_into(source: Path, target: Path, merged: Weights, **more: Any) -> None:
    """Write a checkpoint once more, with the weights of all in place of its own."""
    content = read_checkpoint(source)
    content |= {"state_dict": {f"{PREFIX}{name}": value for name, value in merged.values.items()}, **more}
    content["ema"] = merged.average
    if "sparsity" in content:
        content["sparsity"]["masks"] = merged.masks
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic(target) as temporary:
        torch.save(content, temporary)


def read_merged(folder: Path, cfg: DictConfig) -> tuple[Weights | None, int]:
    """The weights of all after the last round that is done, and its number.

    Raises:
        UserError: the folder holds a federation of other settings, or its weights are damaged.
    """
    settings = {key: cfg[key] for key in ("clients", "rounds", "merge", "purge", "share_by", "max_steps")}
    if not (folder / FACTS).is_file():
        write_json(folder / FACTS, {"settings": settings, "rounds": []})
    facts = read_json(folder / FACTS)
    different = [key for key, value in settings.items() if facts["settings"][key] != value]
    if different:
        key = different[0]
        raise UserError(
            f"{folder} holds a federation with {key}={facts['settings'][key]}, and {key} is {settings[key]} now. Set "
            "it as it was, or choose another run_dir."
        )
    if not (folder / LAST).is_file():
        return None, 0
    try:
        content = read_whole(folder / LAST)
    except Unusable as error:
        raise UserError(f"{folder / LAST} {error}. Copy it back, or choose another run_dir.") from error
    return Weights(content["values"], content["average"], content["masks"]), content["round"]


def write_merged(folder: Path, merged: Weights, number: int, cfg: DictConfig, sparsity: Sparsity | None) -> None:
    """The round is done."""
    content = {"values": merged.values, "average": merged.average, "masks": merged.masks, "round": number}
    with atomic(folder / LAST) as temporary:
        torch.save(content, temporary)
    zeros = sum(int((~mask).sum()) for mask in merged.masks.values())
    total = sum(value.numel() for value in merged.values.values())
    facts = read_json(folder / FACTS)
    facts["rounds"] = [*facts["rounds"][: number - 1], {"round": number, "zeros": zeros, "weights": total}]
    write_json(folder / FACTS, facts)
    log.info("round %d of %d: %s of %s weights are masked", number, cfg.rounds, f"{zeros:,}", f"{total:,}")


def evaluate_all(cfg: DictConfig, folder: Path, merged: Weights, key: dict[str, Any]) -> int:
    """Save and evaluate the weights of all, as a training does that is at its last step; returns the exit code."""
    config, step = cfg.copy(), cfg.max_steps
    with open_dict(config):
        config.paths.output_dir, config.resume = str(folder / "global"), "auto"
    source = checkpoint_path(folder / "client_0" / "checkpoints", step)
    write_into(source, checkpoint_path(folder / "global" / "checkpoints", step), merged, identity=key)
    return train(config)

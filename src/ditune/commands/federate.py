"""Federated averaging, simulated: the ordinary training is each client's, and a server merges between its steps.

A client is a run folder. A round trains it to a later step, as a run that goes on does, from a checkpoint into which
the server has written the weights of all. The optimizer's state stays with the client.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from ditune.commands.clients import PREFIX, client_config, hand_out, taking_part, train_client, write_into
from ditune.commands.train import train
from ditune.config.components import build_components
from ditune.config.instantiate import instantiate, refuse_missing
from ditune.config.keys import APART, check, leaves
from ditune.config.sharded import is_sharded
from ditune.config.training import resume_key
from ditune.errors import UserError
from ditune.files.atomic import atomic, read_json, write_json
from ditune.training.checkpoint_io import checkpoint_path, read_checkpoint, read_whole
from ditune.training.components import Components
from ditune.training.federation import Weights, next_weights
from ditune.training.sharded_checkpoint import Unusable
from ditune.training.sparsity import Sparsity

log = logging.getLogger(__name__)

FACTS = "federation.json"  # in the folder: what was merged, round by round
LAST = "merged.pt"  # likewise: the weights of all after the last round that is done


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
        chosen, step = taking_part(cfg, number), number * length
        configs = [client_config(cfg, of_training, folder, client) for client in chosen]
        if merged is not None:  # all of them before one goes on: the others' checkpoints are still there
            before = taking_part(cfg, number - 1)
            for client, config in zip(chosen, configs, strict=True):
                other = None if client in before else folder / f"client_{before[0]}"
                hand_out(config, merged, step - length, other)
        for config in configs:
            code = train_client(config, step)
            if code:
                return code
        merged = merge_clients(cfg, folder, chosen, sparsity, step)
        write_merged(folder, merged, number, chosen, cfg.rounds)
    trained = folder / f"client_{taking_part(cfg, cfg.rounds)[0]}"
    code = evaluate_all(of_training, folder, trained, merged, key)
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
    if c.objective.critic is not None:
        raise UserError("A server merges networks, and no critics of them. Set objective.critic=null.")
    if c.balance is not None and c.balance.bias_rate:
        raise UserError(
            "balance.bias_rate moves biases of the routers, which are no weights to be merged. Set balance.bias_rate=0."
        )
    if c.method.training_state():
        raise UserError(f"peft={c.method.title} has a state besides its weights. Choose another method, such as lora.")
    return resume_key(cfg, c)


def merge_clients(
    cfg: DictConfig, folder: Path, chosen: Sequence[int], sparsity: Sparsity | None, step: int
) -> Weights:
    """The weights of all, of the checkpoints at a step of the clients that were chosen."""
    clients, factors = [], []
    for client in chosen:
        path = folder / f"client_{client}"
        if not checkpoint_path(path / "checkpoints", step).exists():
            raise UserError(f"The client in {path} has left no checkpoint of step {step}. Free some space and go on.")
        content = read_checkpoint(checkpoint_path(path / "checkpoints", step))
        values = {name.removeprefix(PREFIX): value for name, value in content["state_dict"].items()}
        clients.append(Weights(values, content["ema"], content.get("sparsity", {}).get("masks", {})))
        factors.append(read_json(path / "result.json")["data"]["n"])
    return next_weights(clients, factors, cfg.merge, cfg.purge, sparsity, step)


def read_merged(folder: Path, cfg: DictConfig) -> tuple[Weights | None, int]:
    """The weights of all after the last round that is done, and its number.

    Raises:
        UserError: the folder holds a federation of other settings, or its weights are damaged.
    """
    keys = ("clients", "rounds", "participation", "merge", "purge", "share_by", "max_steps")
    settings = {key: cfg[key] for key in keys}
    if not (folder / FACTS).is_file():
        write_json(folder / FACTS, {"settings": settings, "rounds": []})
    facts = read_json(folder / FACTS)
    theirs = {"participation": 1.0} | facts["settings"]  # newer than the first federations
    different = [key for key, value in settings.items() if theirs[key] != value]
    if different:
        key = different[0]
        raise UserError(
            f"{folder} holds a federation with {key}={theirs[key]}, and {key} is {settings[key]} now. Set "
            "it as it was, or choose another run_dir."
        )
    if not (folder / LAST).is_file():
        return None, 0
    try:
        content = read_whole(folder / LAST)
    except Unusable as error:
        raise UserError(f"{folder / LAST} {error}. Copy it back, or choose another run_dir.") from error
    return Weights(content["values"], content["average"], content["masks"]), content["round"]


def write_merged(folder: Path, merged: Weights, number: int, chosen: list[int], rounds: int) -> None:
    """The round is done."""
    content = {"values": merged.values, "average": merged.average, "masks": merged.masks, "round": number}
    with atomic(folder / LAST) as temporary:
        torch.save(content, temporary)
    zeros = sum(int((~mask).sum()) for mask in merged.masks.values())
    total = sum(value.numel() for value in merged.values.values())
    facts = read_json(folder / FACTS)
    row = {"round": number, "clients": chosen, "zeros": zeros, "weights": total}
    facts["rounds"] = [*facts["rounds"][: number - 1], row]
    write_json(folder / FACTS, facts)
    log.info("round %d of %d: %s of %s weights are masked", number, rounds, f"{zeros:,}", f"{total:,}")


def evaluate_all(cfg: DictConfig, folder: Path, trained: Path, merged: Weights, key: dict[str, Any]) -> int:
    """Save and evaluate the weights of all, as a training does that is at its last step; returns the exit code.

    Args:
        cfg: of the training on all images.
        folder: of the federation.
        trained: folder of a client that was in the last round.
        merged: the weights of all.
        key: resume key of the training on all images.
    """
    config, step = cfg.copy(), cfg.max_steps
    with open_dict(config):
        config.paths.output_dir, config.resume = str(folder / "global"), "auto"
    source = checkpoint_path(trained / "checkpoints", step)
    write_into(source, checkpoint_path(folder / "global" / "checkpoints", step), merged, identity=key)
    return train(config)

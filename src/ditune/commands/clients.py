"""The clients of a simulated federation: who takes part in a round, with what it begins, and its training."""

from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from omegaconf import DictConfig, open_dict
from torch import Tensor

from ditune.commands.train import train
from ditune.config.components import build_components
from ditune.config.training import resume_key
from ditune.errors import UserError
from ditune.files.atomic import atomic
from ditune.rng import mix
from ditune.training.checkpoint_io import checkpoint_path, checkpoints_in, read_checkpoint, step_of, unreadable
from ditune.training.federation import Weights

PREFIX = "network."  # of the names in a checkpoint's state_dict


def taking_part(cfg: DictConfig, number: int) -> list[int]:
    """The clients that train in a round: `cfg.participation` of them and at least one, by a hash of seed and round."""
    count = max(1, int(cfg.participation * cfg.clients + 0.5))
    purpose = crc32(b"participation")
    return sorted(sorted(range(cfg.clients), key=lambda client: mix(cfg.seed, purpose, number, client))[:count])


def client_config(cfg: DictConfig, of_training: DictConfig, folder: Path, client: int) -> DictConfig:
    """A client's own training, on its share of the images and without an evaluation."""
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


def hand_out(config: DictConfig, merged: Weights, begin: int, other: Path | None) -> None:
    """Bring a client to the weights of all, as a checkpoint from which its part of the round goes on.

    Args:
        config: of the client.
        merged: the weights of all.
        begin: steps of the training before the round.
        other: folder of a client that was in the round before, if this one was not. It gives all that depends on the
            step. The optimizer's state is the client's own, however old, or an empty one.

    Raises:
        UserError: the client was in the round before, and its checkpoint is gone.
    """
    checkpoints = Path(config.paths.output_dir) / "checkpoints"
    newest = newest_step(checkpoints)
    target = checkpoint_path(checkpoints, begin)
    if newest > begin:
        return  # an earlier start of this command has trained it
    if newest == begin:
        write_into(target, target, merged)
    elif other is None:
        raise UserError(
            f"{checkpoints} has lost the checkpoint of step {begin}, from which its client goes on. Copy it back, or "
            "choose another run_dir."
        )
    else:
        source = checkpoint_path(other / "checkpoints", begin)
        if newest:
            own = read_checkpoint(checkpoint_path(checkpoints, newest))
            write_into(source, target, merged, **{key: own[key] for key in ("identity", "optimizer_states")})
        else:
            states = [emptied(state) for state in read_checkpoint(source)["optimizer_states"]]
            identity = resume_key(config, build_components(config))
            write_into(source, target, merged, identity=identity, optimizer_states=states)


def newest_step(checkpoints: Path) -> int:
    """Step of the newest checkpoint that can be read; 0 = there is none."""
    return max((step_of(path) for path in checkpoints_in(checkpoints) if unreadable(path) is None), default=0)


def emptied(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state before its first step, from a later one: moments and counters of zero."""
    zeros = {
        number: {key: torch.zeros_like(v) if isinstance(v, Tensor) else v for key, v in values.items()}
        for number, values in state["state"].items()
    }
    return state | {"state": zeros}


def train_client(config: DictConfig, end: int) -> int:
    """A client's part of a round, up to a step of the training; returns the exit code."""
    newest = newest_step(Path(config.paths.output_dir) / "checkpoints")
    if newest >= end:
        return 0  # an earlier start of this command has trained it
    config.max_steps, config.resume = end, "auto" if newest else None
    return train(config)


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

"""What each top-level key of a training decides, and which value of it is as if the key did not exist.

Four readers ask this table: the hash by which a sweep knows its jobs, the check of a resumed run, the protocol of an
evaluation and the report. A key at its neutral value is left out of all of them, so that a new key with a neutral
value never invalidates a finished run, a checkpoint or a record.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import DictConfig, OmegaConf


class Decides(Enum):
    """What a key decides."""

    TRAINING = "resume"  # the trained weights: it must stay when a run goes on
    RESULT = "result"  # only what is measured, or how long is trained: it may change when a run goes on
    NOTHING = "neither"  # where files go, what is shown, how a run is started


ALWAYS = object()  # the neutral value of keys that are never left out


@dataclass(frozen=True)
class Role:
    """A row of the table.

    Args:
        decides: see `Decides`.
        neutral: the value at which the key is left out; ALWAYS = it never is.
    """

    decides: Decides
    neutral: Any = ALWAYS


TRAINING, RESULT, NOTHING = (Role(decides) for decides in Decides)
# fmt: off
ROLES: dict[str, Role] = {
    "name": RESULT,
    "seed": TRAINING,
    "batch_size": TRAINING,
    "max_steps": RESULT,
    "pretrained": TRAINING,
    "pretrained_process": Role(Decides.TRAINING, neutral=None),
    "classes": TRAINING,
    "new_resolution": TRAINING,
    "gradient_checkpointing": RESULT,  # changes rounding only
    "compile": RESULT,                 # likewise
    "network": TRAINING,
    "objective": TRAINING,
    "peft": TRAINING,
    "optimizer": TRAINING,
    "scheduler": TRAINING,
    "ema": TRAINING,
    "data": TRAINING,
    "augment": TRAINING,
    "autoencoder": TRAINING,
    "balance": TRAINING,
    "trainer": TRAINING,
    "sampler": RESULT,
    "cache": Role(Decides.RESULT, neutral=None),
    "metrics": RESULT,
    "callbacks": RESULT,
    "rates": NOTHING,                  # optimizer.lr refers to it
    "labels_train": NOTHING,           # peft.train_labels
    "reruns_batch": NOTHING,           # batch_size
    "paths": NOTHING,
    "logger": NOTHING,
    "launcher": NOTHING,
    "hydra": NOTHING,
    "tags": NOTHING,
    "run_dir": NOTHING,
    "sweep_dir": NOTHING,
    "resume": NOTHING,
    "dry_run": NOTHING,
    "verbose": NOTHING,
    "traceback": NOTHING,
}
# fmt: on
REFERRED_TO = ("paths", "rates", "labels_train", "reruns_batch")  # by other keys, which hold the resolved values
# Of an evaluation's protocol: keys that are newer than records of values.
NEUTRAL_IN_PROTOCOLS = {"guidance_rescale": 0.0, "cache": None}


def role_of(key: str) -> Role:
    """The role of a top-level key; a key that a user has added decides the result."""
    return ROLES.get(key, RESULT)


def significant(values: Mapping[str, Any], neutral: Mapping[str, Any]) -> dict[str, Any]:
    """The values less those at their neutral value."""
    return {key: value for key, value in values.items() if key not in neutral or value != neutral[key]}


def neutral_values() -> dict[str, Any]:
    """The neutral values of the top-level keys that have one."""
    return {key: role.neutral for key, role in ROLES.items() if role.neutral is not ALWAYS}


def deciding(callbacks: Mapping[str, Any]) -> dict[str, Any]:
    """Of the group `callbacks`, what decides the result: what is measured does so where it chooses the weights."""
    values = {name: dict(group) if isinstance(group, Mapping) else group for name, group in callbacks.items()}
    checkpoint, stopping = values.get("checkpoint", {}), values.get("early_stopping", {})
    checkpoint.pop("keep_finished", None)
    values.pop("ranks", None)  # checks change nothing
    if values.get("nonfinite", {}).get("action", "stop") == "stop":
        values.pop("nonfinite", None)
    chosen = checkpoint.get("best") is not None
    if not chosen:
        checkpoint.pop("best", None)
    if not chosen or stopping.get("patience") is None:
        values.pop("early_stopping", None)
    return values if chosen else {name: group for name, group in values.items() if name not in ("held_out", "metrics")}


def job_hash(cfg: DictConfig) -> str:
    """Hash of all that decides the result of a training, wherever its files go.

    Raises:
        OmegaConfBaseException: a reference in the config leads nowhere.
    """
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    for key in list(cfg):
        if role_of(str(key)) is NOTHING and key not in REFERRED_TO:
            cfg.pop(key)  # some of them can be resolved in the run only
    cfg.paths.output_dir = ""  # likewise
    values = significant(OmegaConf.to_container(cfg, resolve=True), neutral_values())
    values = {key: value for key, value in values.items() if role_of(key) is not NOTHING}
    if values.get("trainer", {}).get("accumulate_grad_batches") == "auto":
        values["trainer"]["accumulate_grad_batches"] = 1  # the same but for rounding, whatever the device decides
    strategy = values.get("trainer", {}).get("strategy")
    if isinstance(strategy, dict):
        strategy.pop("timeout", None)
    if "callbacks" in values:
        values["callbacks"] = deciding(values["callbacks"])
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

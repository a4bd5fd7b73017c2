"""What each top-level key of a training decides, and which value of it is as if the key did not exist.

Four readers ask this table: the hash by which a sweep knows its jobs, the check of a resumed run, the protocol of an
evaluation and the report. A key at its neutral value is left out of all of them, so that a new key with a neutral
value never invalidates a finished run, a checkpoint or a record.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ditune.config.data_keys import unused


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
    "frozen_weights": Role(Decides.TRAINING, neutral=None),
    "gradient_checkpointing": RESULT,  # changes rounding only
    "compile": RESULT,                 # likewise
    "network": TRAINING,
    "objective": TRAINING,
    "transfer": Role(Decides.TRAINING, neutral=None),
    "patches": Role(Decides.TRAINING, neutral=None),
    "sparsity": Role(Decides.TRAINING, neutral=None),
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
    "addresses": NOTHING,
    "logger": NOTHING,
    "launcher": NOTHING,
    "hydra": NOTHING,
    "tags": NOTHING,
    "run_dir": NOTHING,
    "sweep_name": NOTHING,
    "sweep_dir": NOTHING,
    "resume": NOTHING,
    "dry_run": NOTHING,
    "price_per_hour": NOTHING,
    "verbose": NOTHING,
    "traceback": NOTHING,
}
# fmt: on
REFERRED_TO = ("paths", "rates", "labels_train", "reruns_batch")  # by other keys, which hold the resolved values
# Below the top level: keys that are newer than finished runs, with the value at which they are left out.
NEUTRAL_BELOW = {
    "trainer.num_nodes": 1,
    "trainer.strategy.bucket_cap_mb": 25,
    "data.fraction": None,
    "data.subset": None,
    "data.pictures.limit": None,
    "data.pictures.partition": None,
    "metrics.reference.limit": None,
    "metrics.reference.partition": None,
    "sampler.guide": "null_class",
    "sampler.guide_checkpoint": None,
    "sampler.guide_strength": 0.5,
    "metrics.keep_images": False,
    "objective.interval": None,
    "objective.teacher": None,
    "objective.critic": None,
    "objective.derivative": "jvp",
    "objective.difference_step": 1e-4,
    "objective.tangent": "path",
    "objective.control": False,
    "objective.process.bridge": "aligned",
    "sparsity.teacher": 0.0,
    "objective.process.step_blocks": None,
    "sampler.noise_awareness": 0.0,
    "sampler.guidance_input": None,
}
# Of an evaluation's protocol: keys that are newer than records of values.
NEUTRAL_IN_PROTOCOLS = {
    "guidance_rescale": 0.0,
    "cache": None,
    "guide": None,
    "noise_awareness": 0.0,
    "guidance_input": None,
    "experts": None,
}


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
    for key in ("keep_finished", "on_full"):
        checkpoint.pop(key, None)
    values.pop("ranks", None)  # checks change nothing
    if values.get("nonfinite", {}).get("action", "stop") == "stop":
        values.pop("nonfinite", None)
    chosen = checkpoint.get("best") is not None
    if not chosen:
        checkpoint.pop("best", None)
    if not chosen or stopping.get("patience") is None:
        values.pop("early_stopping", None)
    return values if chosen else {name: group for name, group in values.items() if name not in ("held_out", "metrics")}


# What a sweep may change from one start to the next: its finished jobs are known without these keys.
# fmt: off
ROUNDING = "changes rounding only"
WHERE = "says where files lie"
WHEN = "says when something is shown or written, or whether it is"
SPEED = "says how fast images come"
SAME_RESULT: dict[str, str] = {
    "gradient_checkpointing": ROUNDING,
    "compile": ROUNDING,
    "trainer.accelerator": ROUNDING,
    "trainer.devices": ROUNDING,                 # batch_size is global, and positions decide all random numbers
    "trainer.num_nodes": ROUNDING,
    "trainer.strategy": ROUNDING,
    "trainer.accumulate_grad_batches": ROUNDING,
    "trainer.log_every_n_steps": WHEN,
    "trainer.enable_model_summary": WHEN,
    "sampler.batch_size": ROUNDING,
    "data.num_workers": SPEED,
    "data.in_memory": SPEED,
    "data.*.in_memory": SPEED,
    "metrics.*reference.in_memory": SPEED,
    "data.prepared": WHERE,
    "data.*.manifest": WHERE,
    "metrics.*reference.manifest": WHERE,
    "metrics.judge.cache": WHERE,
    "metrics.keep_images": WHEN,
    "callbacks.samples.every_n_steps": WHEN,
    "callbacks.checkpoint.every_n_steps": WHEN,
    "callbacks.checkpoint.keep": WHEN,
    "callbacks.checkpoint.on_full": WHEN,
    "callbacks.routing.every_n_steps": WHEN,
}
# fmt: on
# Datasets whose content is published: their name says what the images are, and data.root only where they lie.
PUBLISHED = ("ArtBench10", "CUB", "Caltech101", "CelebAHQ", "DF20MMini", "Flowers102", "Food101", "ImageNet")
PUBLISHED = tuple(f"ditune.data.{name}" for name in (*PUBLISHED, "StanfordCars", "SUN397"))
OF_PUBLISHED = ("data.root", "data.*.root", "metrics.*reference.root")
# The balance loss depends on how many images a micro-batch has (docs/guide/moe.md).
OF_MICRO_BATCHES = ("trainer.devices", "trainer.num_nodes", "trainer.accumulate_grad_batches")


def changes_no_result(name: str) -> bool:
    """Whether the key of this dotted name changes a result by rounding at most."""
    parts = name.split(".")
    names = [".".join(parts[:k]) for k in range(1, len(parts) + 1)]  # its groups too
    return any(fnmatchcase(name, pattern) for name in names for pattern in SAME_RESULT)


def job_identity(cfg: DictConfig) -> str:
    """Hash by which a sweep knows a job: of all that changes its result by more than rounding, see SAME_RESULT.

    Args:
        cfg: of a training. Folders of `paths` stand in it by their names, so that it may move with them.

    Raises:
        OmegaConfBaseException: a reference in the config leads nowhere.
    """
    cfg = _deciding(cfg)
    for key in cfg.paths:
        cfg.paths[key] = f"<{key}>"
    values = _values(cfg)
    free = set(SAME_RESULT)
    if _target(values.get("data")) in PUBLISHED:
        free |= set(OF_PUBLISHED)
    scope = (values.get("balance") or {}).get("scope")
    if scope == "batch":
        free -= set(OF_MICRO_BATCHES)
    elif scope == "global":  # of all ranks, but of the micro-batches so far
        free.discard("trainer.accumulate_grad_batches")
    return _hashed(dict(_without(values, free)))


def job_hash(cfg: DictConfig) -> str:
    """Hash of the whole config of a training but for the keys that decide nothing; stored as config_hash.

    Runs of versions without `job_identity` are known by it alone.

    Raises:
        OmegaConfBaseException: a reference in the config leads nowhere.
    """
    cfg = _deciding(cfg)
    cfg.paths.output_dir = ""  # it can be resolved in the run only
    return _hashed(_values(cfg))


def _deciding(cfg: DictConfig) -> DictConfig:
    """A copy without the keys that decide nothing, some of which can be resolved in the run only."""
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    for key in list(cfg):
        if role_of(str(key)) is NOTHING and key not in REFERRED_TO:
            del cfg[key]
    return cfg


def _values(cfg: DictConfig) -> dict[str, Any]:
    values = significant(OmegaConf.to_container(cfg, resolve=True), neutral_values())
    idle = {f"data.{key}": None for key in unused(cfg.data)} if "data" in cfg else {}
    for name, neutral in (NEUTRAL_BELOW | idle).items():
        leave_out(values, name, neutral)
    if values.get("trainer", {}).get("accumulate_grad_batches") == "auto":
        values["trainer"]["accumulate_grad_batches"] = 1  # the same but for rounding, whatever the device decides
    strategy = values.get("trainer", {}).get("strategy")
    if isinstance(strategy, dict):
        strategy.pop("timeout", None)
    if "callbacks" in values:
        values["callbacks"] = deciding(values["callbacks"])
    return {key: value for key, value in values.items() if role_of(key) is not NOTHING}


def leave_out(values: dict[str, Any], name: str, neutral: Any) -> None:
    """Remove the key of this dotted name from nested values, if it has its neutral value."""
    *groups, key = name.split(".")
    inner: Any = values
    for group in groups:
        inner = inner.get(group) if isinstance(inner, dict) else None
    if isinstance(inner, dict) and key in inner and inner[key] == neutral:
        del inner[key]


def _hashed(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _target(data: Any) -> str | None:
    pictures = data.get("pictures") if isinstance(data, dict) else None
    return pictures.get("_target_") if isinstance(pictures, dict) else None


def _without(values: Mapping[str, Any], patterns: set[str], path: str = "") -> Iterator[tuple[str, Any]]:
    """The items of nested values whose dotted names fit none of the patterns."""
    for key, value in values.items():
        name = f"{path}{key}"
        if not any(fnmatchcase(name, pattern) for pattern in patterns):
            yield key, dict(_without(value, patterns, f"{name}.")) if isinstance(value, dict) else value

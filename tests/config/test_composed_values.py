"""Every command, every option of every group and every experiment composes to the values it had before.

A change of a config that alters a composed value, on purpose or not, fails here with the names of what changed.
Renew the stored hashes on purpose, and read the diff of the file:

    PYTHONPATH=src python tests/config/test_composed_values.py
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf, open_dict

from ditune import cli

CONFIGS = Path(cli.CONFIGS)
STORED = Path(__file__).parents[1] / "golden" / "composed.json"
COMMANDS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
NOT_TRAINED = {"hydra", "reporting", "foreign"}  # folders that hold no groups of train.py


def options(group: str) -> list[str]:
    """Options of a group, without its base files."""
    return sorted(path.stem for path in (CONFIGS / group).glob("[!_]*.yaml"))


def compositions() -> dict[str, tuple[str, list[str]]]:
    """Name of a composition -> (command, overrides)."""
    lines = list(COMMANDS)
    groups = sorted(path.name for path in CONFIGS.iterdir() if path.is_dir() and path.name not in NOT_TRAINED)
    for group in groups:
        # experiments override other groups' options, so every option is composed without one
        bare = [] if group in ("experiment", "sweep") else ["~experiment"]
        lines += [" ".join(["train", *bare, f"{group}={option}"]) for option in options(group)]
    for command, group in (("evaluate", "data"), ("evaluate", "metrics"), ("sample", "sampler")):
        lines += [f"{command} {group}={option}" for option in options(group)]
    lines = [f"{line} data.root=/data" if line.endswith("data=folder") else line for line in lines]
    # the main job's learning rates by method and label table
    main_jobs = ("difffit_emoji", "difffit_pixels")
    lines += [
        f"train experiment={experiment} peft={method} classes={classes}"
        for experiment in main_jobs
        for method in ("full", "difffit", "lora")
        for classes in ("null", "reinit")
    ]
    lines.remove("train sweep=search_lr")  # needs the optional Optuna sweeper
    return {line: (line.split()[0], line.split()[1:]) for line in lines}


def composed(command: str, overrides: list[str]) -> dict[str, Any]:
    """The resolved values of a composition, without the paths and the time of this machine."""
    cfg = hydra.compose(command, overrides)
    with open_dict(cfg):
        for key in ("run_dir", "sweep_dir", "out", "hydra"):
            cfg.pop(key, None)
        if "paths" in cfg:
            cfg.paths.root_dir, cfg.paths.output_dir = "/root", "/output"
    return OmegaConf.to_container(cfg, resolve=True)


def hashes(names: dict[str, tuple[str, list[str]]]) -> dict[str, str]:
    """Composition -> first 16 digits of the SHA-256 of its values."""
    cli.prepare()
    found = {}
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for name, (command, overrides) in names.items():
            text = json.dumps(composed(command, overrides), sort_keys=True)
            found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return found


@pytest.mark.slow
def test_composed_values_are_those_of_before():
    stored, now = json.loads(STORED.read_text(encoding="utf-8")), hashes(compositions())
    changed = [name for name in sorted(stored | now) if stored.get(name) != now.get(name)]
    assert not changed, f"compositions with other values than {STORED.name} has: {changed}"


if __name__ == "__main__":
    STORED.write_text(json.dumps(hashes(compositions()), indent=1, sort_keys=True) + "\n", encoding="utf-8")

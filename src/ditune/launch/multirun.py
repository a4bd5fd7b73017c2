"""What the sweep's own config leaves out and every job needs: the sweep's name, and folders that no two datasets share.

Both are added to the overrides of the sweep, which every sweeper gives to every job of every launcher.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from ditune.config.grammar import hydra_value
from ditune.config.swept import joined, of_the_sweep

log = logging.getLogger(__name__)

OWN_PREPARED = "data.prepared=${data.root}/prepared/${data.name}"


def complete(config: DictConfig) -> None:
    """Give the sweep its name, and its jobs the overrides that depend on what is swept.

    Args:
        config: of the sweep, which is changed in place.
    """
    task = list(OmegaConf.to_container(config.hydra.overrides.task))  # nothing resolved
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    overrides = {override.key_or_group: override for override in of_the_sweep(task, params)}
    with open_dict(config):
        if "sweep_name" not in overrides:
            config.sweep_name = name_of(config, overrides)
        # of a folder that sweep_dir= has chosen, its name
        added = [f"sweep_name={hydra_value(Path(config.hydra.sweep.dir).name)}"]
        if share_a_folder(config, overrides):
            log.info("the datasets share data.root, so each gets its own folder there: %s", OWN_PREPARED)
            added.append(OWN_PREPARED)
        kept = [text for text in task if not text.startswith("sweep_name=")]
        config.hydra.overrides.task = [*kept, *added]


def name_of(config: DictConfig, overrides: dict[str, Override]) -> str:
    """The sweep's name: name= or that of its file in configs/sweep/; else its experiments.

    A sweep of one experiment that the command line names is called as its runs are.
    """
    experiment = overrides.get("experiment")
    in_base = experiment is None or (
        not experiment.is_sweep_override() and experiment.input_line in config.hydra.overrides.task
    )
    if in_base or "name" in overrides or _without_experiment(config) != _without_experiment(config, alone=True):
        return config.name
    return joined(options_of(experiment))


def options_of(override: Override) -> list[str]:
    """The options that a sweep has of a group."""
    if override.is_discrete_sweep():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


def share_a_folder(config: DictConfig, overrides: dict[str, Override]) -> bool:
    """Whether several datasets would keep their manifests and latents in one folder, for they have one data.root."""
    root = overrides.get("data.root")
    group = next((name for name in ("data", "experiment") if name in overrides), None)
    if root is None or "data.prepared" in overrides or group is None or not overrides[group].is_discrete_sweep():
        return False
    values = options_of(root)
    if len(values) > 1:
        return False
    names: dict[str, set[str]] = {}
    for option in options_of(overrides[group]):
        try:
            data = _composed(config, [f"{group}={option}"]).data
        except HydraException:
            return False  # a wrong option: composing the jobs says so in a sentence
        if "root" in data and "pictures" in data:
            data.root = values[0].strip("'\"")
            names.setdefault(str(data.prepared), set()).add(data.name)
    return any(len(several) > 1 for several in names.values())


def _without_experiment(config: DictConfig, alone: bool = False) -> str:
    """`name` where no experiment says it; `alone` = and no other group either."""
    choices = config.hydra.runtime.choices
    groups = [] if alone else [f"{group}={choices[group]}" for group in ("preset", "sweep") if choices.get(group)]
    return _composed(config, ["~experiment", *groups]).name


def _composed(config: DictConfig, overrides: Sequence[str]) -> DictConfig:
    loader = GlobalHydra.instance().config_loader()
    return loader.load_configuration(config.hydra.job.config_name, list(overrides), RunMode.RUN)

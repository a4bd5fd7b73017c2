"""The trainings that a command line of src/prepare.py names: one, or the jobs of a sweep."""

from collections.abc import Mapping, Sequence
from itertools import product

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from ditune.cli import CONFIGS

OF_TRAININGS = ("experiment", "sweep")  # groups that only src/train.py has
WITHOUT_FILES = ("peft", "seed", "optimizer", "scheduler", "ema", "batch_size", "max_steps")  # they ask for no files


def is_of_trainings(arguments: Sequence[str]) -> bool:
    """Whether arguments of src/prepare.py name trainings; else they name a dataset alone."""
    return any(argument.lstrip("+~").partition("=")[0] in OF_TRAININGS for argument in arguments)


def as_one_run(arguments: Sequence[str]) -> list[str]:
    """The arguments for one start of Hydra: of each list of values the first, and all of them for `jobs`.

    Args:
        arguments: of the command line, such as `sweep=difffit_table` or `experiment=difffit_cub,difffit_food101`.
    """
    kept, swept = [], {}
    for argument in arguments:
        override = _parsed(argument)
        if argument in ("-m", "--multirun"):
            continue
        if override is not None and override.is_choice_sweep():
            values = list(override.sweep_string_iterator())
            key = override.get_key_element()
            swept[key] = ",".join(values)
            argument = f"{key}={values[0]}"
        kept.append(argument)
    params = ",".join(f"{key}: {_quoted(value)}" for key, value in swept.items())
    return [*kept, "hydra.mode=RUN", *([f"++hydra.sweeper.params={{{params}}}"] if swept else [])]


def jobs(params: Mapping[str, str] | None, overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each job, as Hydra's sweeper makes them; keys that ask for no files keep their first value.

    Args:
        params: of the sweep, key -> its values with commas between them.
        overrides: of the command line.
    """
    given = [o for o in overrides if o.lstrip("+~").partition("=")[0] not in (params or {})]
    choices = []
    for key, value in (params or {}).items():
        override = _parsed(f"{key}={value}")
        if override is None or (override.is_sweep_override() and not override.is_choice_sweep()):
            continue  # a range of a search
        values = list(override.sweep_string_iterator()) if override.is_choice_sweep() else [override.get_value_string()]
        same = key.lstrip("+~").partition(".")[0] in WITHOUT_FILES
        choices.append([f"{key}={one}" for one in (values[:1] if same else values)])
    return [[*given, *chosen] for chosen in product(*choices)]


def compose(overrides: Sequence[str]) -> DictConfig:
    """The config of src/train.py for one job."""
    if GlobalHydra.instance().is_initialized():
        return hydra.compose("train", list(overrides))
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        return hydra.compose("train", list(overrides))


def _parsed(argument: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None  # a flag, or what Hydra itself will refuse


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"

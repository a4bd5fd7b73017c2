"""What a sweep's command line says of its jobs before they are composed.

Hydra composes a config for the sweep itself, from what all its jobs have in common. Of a group that is swept, such as
experiment=a,b, it has the default option, and a key that only the swept options have is none of that config's.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

FLAGS = ("-m", "--multirun", "hydra.mode=MULTIRUN")
ALONE = "hydra.mode=RUN"  # which the launcher gives to every job
REFUSED = re.compile(r"Could not (?:override|append to config\. An item is already at) '(.+?)'")
JOINED = 60  # characters of experiments' names in that of a folder


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for several jobs; each file of configs/sweep/ does, but for one of its jobs."""
    return ALONE not in arguments and any(argument in FLAGS or argument.startswith("sweep=") for argument in arguments)


def held_back(error: Exception, arguments: Sequence[str]) -> list[str] | None:
    """The command line once more, with the override that the sweep's own config has refused left to the jobs.

    Hydra gives the values of a sweep to the jobs alone, so the override becomes a sweep over its one value.

    Args:
        error: that Hydra has raised.
        arguments: of the command line.

    Returns:
        None if there is nothing to leave to jobs.
    """
    refused = REFUSED.match(str(error))
    if refused is None or not is_sweep(arguments):
        return None
    changed = list(arguments)
    for i, argument in enumerate(arguments):
        key, _, value = argument.partition("=")
        if key.lstrip("+") == refused[1] and value and not value.startswith("choice("):
            changed[i] = f"{key}=choice({value})"
    return None if changed == list(arguments) else changed


def swept_groups(overrides: Sequence[Override], folder: str) -> dict[str, list[str]]:
    """The groups of which several options are swept, with these options.

    Args:
        overrides: of the sweep, parsed.
        folder: of the configs.
    """
    groups = {}
    for override in overrides:
        if override.is_discrete_sweep() and (Path(folder) / override.key_or_group).is_dir():
            groups[override.key_or_group] = list(override.sweep_string_iterator())
    return groups


def of_the_sweep(arguments: Sequence[str], params: Sequence[str]) -> list[Override]:
    """The overrides of all jobs: those of the sweeper's config, and after them those of the command line."""
    texts = [*params, *(text for text in arguments if text[0] != "-" and ("=" in text or text[0] == "~"))]
    return list({override.get_key_element(): override for override in parsed(texts)}.values())


def parsed(texts: Sequence[str]) -> list[Override]:
    """Overrides as Hydra reads them."""
    return OverridesParser.create().parse_overrides(list(texts))


def joined(experiments: Sequence[str]) -> str:
    """A folder's name of experiments: theirs joined by +; of many, the first one, how many others, and a hash."""
    names = sorted(set(experiments))
    text = "+".join(names)
    if len(text) <= JOINED:
        return text
    return f"{names[0]}+{len(names) - 1}_others-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def lacking(key: str, folder: str, name: str, arguments: Sequence[str]) -> str | None:
    """Which options of the swept groups lack a key that the command line sets, as a sentence.

    Args:
        key: dotted.
        folder: of the configs.
        name: of the entry point's config.
        arguments: of the command line.

    Returns:
        None if it is no sweep over groups, or if all or none of a group's options lack the key.
    """
    chosen = [argument for argument in arguments if argument.startswith(("sweep=", "+sweep="))]
    with hydra.initialize_config_dir(folder, version_base="1.3"):
        sweeper = hydra.compose(name, chosen, return_hydra_config=True).hydra.sweeper
        params = [f"{param}={value}" for param, value in (sweeper.get("params") or {}).items()]
        overrides = of_the_sweep(arguments, params)
        groups = swept_groups(overrides, folder)
        first = {group: options[0] for group, options in groups.items()}
        fixed = [
            f"{override.key_or_group}={override.get_value_element_as_str()}"
            for override in overrides
            if override.key_or_group not in groups and (Path(folder) / override.key_or_group).is_dir()
        ]
        for group, options in groups.items():
            without = [
                option
                for option in options
                if not _takes(name, [*fixed, *(f"{g}={o}" for g, o in (first | {group: option}).items())], key)
            ]
            if 0 < len(without) < len(options):
                others = ", ".join(option for option in options if option not in without)
                return (
                    f"{group}={', '.join(without)} has no key '{key}', and a sweep sets it for all of its jobs. "
                    f"Leave it out, or sweep over {others} alone."
                )
    return None


def _takes(name: str, choices: Sequence[str], key: str) -> bool:
    """Whether the config of these choices has the key."""
    try:
        hydra.compose(name, [*choices, f"{key}=null"])
    except HydraException as error:
        return REFUSED.match(str(error)) is None
    return True

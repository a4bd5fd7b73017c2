"""A wrong override of the command line in one sentence, with the key or the option that was meant."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

import hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from ditune.config.swept import lacking

# The field's names of keys whose own names are older and stand in stored configs.
ALIASES = {"callbacks.step_grids": "callbacks.strips", "sampler.sampler.step_size": "sampler.sampler.told"}
# Of one command: a key that Hydra would take for the group of the same name.
ALIASES_OF = {"evaluate": {"sweep": "runs"}}


def current(argument: str, command: str = "train") -> str:
    """An argument of the command line, with the stored name of a key that it calls by an alias.

    Args:
        argument: such as "callbacks.step_grids.n=4"; anything else is returned as it is.
        command: the entry point's name.
    """
    key, equals, value = argument.partition("=")
    prefix = key[: len(key) - len(key.lstrip("+~"))]
    name = key.removeprefix(prefix)
    for alias, stored in (ALIASES | ALIASES_OF.get(command, {})).items():
        if name == alias or name.startswith(f"{alias}."):
            return prefix + stored + name.removeprefix(alias) + equals + value
    return argument


def explain(error: Exception, folder: str, name: str, overrides: Sequence[str]) -> str:
    """What is wrong with the overrides, as a sentence.

    Args:
        error: what Hydra raised while it composed the config.
        folder: of the configs.
        name: of the entry point's config.
        overrides: of the command line.
    """
    text = str(error)
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = (error.missing_cfg_file or "").rpartition("/")
        options = [name for name in error.options if not name.startswith("_")]  # without base files
        near = _did_you_mean(get_close_matches(option, options, n=1))
        return f"There is no {group}={option}.{near} Choose one of {', '.join(options)}."
    if isinstance(error, OverrideParseException):
        return _syntax(error.override, text)
    if text.startswith("Ambiguous value"):
        return _ambiguous(text.partition("'")[2].partition("'\n")[0])
    if there := re.match(r"Could not append to config. An item is already at '(.+?)'", text):
        return f"The key '{there[1]}' is there already. Leave out the + to set it."
    if plus := re.match(r"(?:Multiple values for |force-add .*'\+*)([\w/]+)|([\w/]+) appears more than", text):
        group = plus[1] or plus[2]
        return f"The group '{group}' is there already. Leave out the + to choose its option: {group}=..."
    if unknown := re.match(r"Could not (?:override|delete from config\.) '(.+?)'", text):
        some_lack_it = lacking(unknown[1], folder, name, overrides)
        return some_lack_it or _unknown_key(unknown[1], _known_keys(folder, name, overrides))
    for override in overrides:
        group, _, option = override.partition("=")
        if option in ("", "null") and (Path(folder) / group).is_dir():
            options = sorted(path.stem for path in (Path(folder) / group).glob("[!_]*.yaml"))
            return f"The group '{group}' cannot be empty. Choose one of {', '.join(options)}."
    return text.strip().splitlines()[0].rstrip(".") + "."


def _syntax(override: str, text: str) -> str:
    if "=" not in override:
        return f"'{override}' is no override, for it has no value. Write key=value, and quote a value with spaces."
    key, _, value = override.partition("=")
    return (
        f"The value of '{override}' cannot be read. Quote a value with special characters twice: '{key}=\"{value}\"'."
    )


def _ambiguous(override: str) -> str:
    key, _, value = override.partition("=")
    return f"'{override}' has several values. Add -m to sweep over them, or write a list as '{key}=[{value}]'."


def _unknown_key(key: str, known: Sequence[str]) -> str:
    parent = key.rpartition(".")[0]
    there = [name.removeprefix(f"{parent}.") for name in known if name.rpartition(".")[0] == parent]
    hint = _did_you_mean(nearest(key, known))
    if not hint and parent and there:
        hint = f" The keys of {parent} are {', '.join(there)}."
    return f"There is no key '{key}'.{hint or ' --cfg job shows all keys.'}"


def _did_you_mean(near: Sequence[str]) -> str:
    return f" Did you mean {' or '.join(near)}?" if near else ""


def nearest(key: str, known: Sequence[str]) -> list[str]:
    """The keys that were most likely meant: of the same last part, of the same parent, or else of similar letters."""
    known = [name for name in known if name.startswith("hydra.") == key.startswith("hydra.")]
    parent, _, last = key.rpartition(".")
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    if same := [name for name in known if name.rpartition(".")[2] == last]:
        return same[:3]
    if parent and (near := get_close_matches(key, siblings, n=1, cutoff=1 - 0.4 * len(last) / len(key))):
        return near
    if parent in known:
        return [] if siblings else [parent]
    if near := get_close_matches(key, known, n=1):
        return near
    parts = {name.rpartition(".")[2]: name for name in reversed(known)}
    return [parts[part] for part in get_close_matches(last, parts, n=1, cutoff=0.8)]


def _known_keys(folder: str, name: str, overrides: Sequence[str]) -> list[str]:
    """Dotted names of all keys and groups of the config, with the groups that the command line chooses."""
    groups = {str(path.parent.relative_to(folder)) for path in Path(folder).rglob("*.yaml")} - {"."}
    chosen = [override for override in overrides if override.partition("=")[0] in groups and "," not in override]
    for attempt in (chosen, []):
        try:
            with hydra.initialize_config_dir(folder, version_base="1.3"):
                cfg = hydra.compose(name, attempt, return_hydra_config=True)
        except (HydraException, ValueError):
            continue  # there is another wrong one among the choices, which is said once this one is right
        return list(dict.fromkeys([*_names(cfg), *sorted(groups)]))
    return sorted(groups)


def _names(cfg: DictConfig, path: str = "") -> Iterable[str]:
    for key in cfg:
        if str(key).startswith("_"):
            continue  # _target_ and the like are not for the command line
        name = f"{path}.{key}" if path else str(key)
        yield name
        inner = not OmegaConf.is_missing(cfg, key) and not OmegaConf.is_interpolation(cfg, key)
        if inner and isinstance(cfg[key], DictConfig):
            yield from _names(cfg[key], name)

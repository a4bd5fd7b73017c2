"""Objects from groups of the config; mistakes in them become one sentence that names the group."""

import inspect
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from ditune.config.grammar import literal, resolved
from ditune.errors import UserError


def instantiate(config: DictConfig | None, what: str, **kwargs: object) -> Any:
    """Build the object of one group.

    Args:
        config: the group, with a `_target_`; None gives None.
        what: name of the group, for the message.
        kwargs: further arguments of the target.

    Raises:
        UserError: the target refuses its keys or their values.
    """
    try:
        built = hydra.utils.instantiate(_as_hydra_reads(config), **kwargs)
        if isinstance(built, partial):
            inspect.signature(built.func).bind_partial(**built.keywords)  # its unknown keys would show only when called
        return built
    except (InstantiationException, TypeError) as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        reason = str(cause or error).splitlines()[0]
        raise UserError(
            f"The config group '{what}' cannot be built: {reason}. See the comments in configs/{what}/ for its keys."
        ) from error


def training_images(cfg: DictConfig) -> Any:
    """The dataset that a training reads: of the images of data.pictures, the share data.fraction, then data.subset.

    Raises:
        UserError: it cannot be built, or no image is left.
    """
    images = instantiate(cfg.data.pictures, "data").part(cfg.data.get("fraction"))  # configs of before have no such key
    if cfg.data.get("subset") is None:
        return images
    from ditune.data.subsets import choose, of_client  # with torch, which most readers of configs do without
    from ditune.distributed import best_device

    def features() -> Any:  # (N, D)
        suite = instantiate(cfg.metrics.judge, "metrics")
        suite.extractor.to(best_device())
        return suite.reference(images)[:, suite.extractor.columns["features"]]

    given = plain(cfg.data.subset)
    if {"client", "clients"} <= set(given) <= {"client", "clients", "by", "seed"}:  # of src/federate.py
        return images.subset(of_client(images.names, images.labels, **given))
    if "n" not in given or not set(given) <= {"n", "by", "seed", "balanced"}:
        raise UserError(f"data.subset has the keys {', '.join(given)}. Give n, and by, seed or balanced as you like.")
    return images.subset(choose(images.names, images.labels, features, **given))


def refuse_strangers(config: DictConfig, groups: Sequence[str], path: Path) -> None:
    """Refuse a config that someone else may have written, if building its groups would call more than our own classes.

    A `_target_` can name anything that Python can import, and call it with any arguments.

    Args:
        config: of a run folder.
        groups: that are going to be built from it; missing ones are left out.
        path: of the config, for the message.

    Raises:
        UserError: a `_target_` in one of the groups is no class of this package, or a group is none.
    """
    for group in groups:
        values = {} if config.get(group) is None else config[group]
        if not isinstance(values, dict | DictConfig):
            raise UserError(f"{path} is damaged: '{group}' is {values!r}, and no group of keys. Copy it again.")
        for target in _targets(plain(values) if values else {}):
            if not _is_own_class(target):
                raise UserError(
                    f"{path} would call {target} (in its group '{group}'), which is no class of this package. Files of "
                    "others can do harm in this way. If it is your own class, put it into src/ditune "
                    "(docs/guide/extending.md)."
                )


def _targets(values: object) -> Iterator[Any]:
    """What stands under `_target_`, at any depth."""
    if isinstance(values, dict):
        yield from (value for key, value in values.items() if key == "_target_")
        values = list(values.values())
    if isinstance(values, list):
        for value in values:
            yield from _targets(value)


def _is_own_class(target: object) -> bool:
    if not isinstance(target, str) or not target.startswith("ditune."):
        return False
    try:
        found = hydra.utils.get_object(target)
    except (ImportError, AttributeError, ValueError):
        return True  # there is nothing to call: building it says so
    # ditune.cli.os.system is found as well, but belongs to os
    return inspect.isclass(found) and found.__module__.startswith("ditune.")


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain values with everything resolved."""
    return OmegaConf.to_container(cfg, resolve=True)


def refuse_missing(cfg: DictConfig) -> None:
    """Raises UserError if a key without a default has no value."""
    missing = missing_keys(OmegaConf.to_container(cfg))
    if missing:
        raise UserError(
            f"The config has no value for {', '.join(missing)}. Set it on the command line: {missing[0]}=..."
        )


def missing_keys(values: object, path: str = "") -> list[str]:
    """Dotted names of the keys that are still ???; OmegaConf's own search fails at references to them."""
    if isinstance(values, dict):
        return [name for key, value in values.items() for name in missing_keys(value, f"{path}.{key}".lstrip("."))]
    return [path] if values == "???" else []


def _as_hydra_reads(config: DictConfig | None) -> DictConfig | None:
    """Hydra resolves the config and then reads it again: paths with `${` must be escaped twice."""
    if not isinstance(config, DictConfig):
        return config
    return OmegaConf.create(literal(OmegaConf.to_container(resolved(config))))

"""All files that a config needs, asked of the classes that it names; nothing is built, read or fetched."""

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ditune.checkpoints import published
from ditune.config.grammar import resolved
from ditune.config.instantiate import missing_keys, plain
from ditune.files.download import shown
from ditune.files.needs import Addresses, Need

PARTS = ("data", "autoencoder", "pretrained", "metrics")


def needs_of(cfg: DictConfig, parts: Collection[str] = PARTS) -> list[Need]:
    """What a run of the config needs, in the order of `PARTS`; each file once.

    Args:
        cfg: of src/train.py or src/prepare.py.
        parts: those to ask.
    """
    addresses, found = addresses_of(cfg), []
    if "data" in parts:
        found += _asked(_values(cfg.data, "pictures"), addresses)
    if "autoencoder" in parts:
        found += _asked(_values(cfg, "autoencoder"), addresses)
    if "pretrained" in parts and cfg.get("pretrained") not in (None, "???"):
        found += published.needs(cfg.pretrained, networks_folder(cfg), addresses)
    teacher = (cfg.get("objective") or {}).get("teacher")
    if "pretrained" in parts and teacher in published.PUBLISHED:
        found += published.needs(teacher, networks_folder(cfg), addresses)
    if "metrics" in parts:
        for key in ("judge", "reference", "base_reference"):
            found += _asked(_values(cfg.metrics, key), addresses) if cfg.metrics.get(key) else []
    return each_once(found)


def parts_of_a_training(cfg: DictConfig) -> Collection[str]:
    """The parts that a training asks; one that is not evaluated needs no metrics."""
    return PARTS if cfg.metrics.n else PARTS[:-1]


def each_once(needs: Iterable[Need]) -> list[Need]:
    """The first need of each path."""
    first: dict[Path, Need] = {}
    for need in needs:
        first.setdefault(need.path, need)
    return list(first.values())


def without_secrets(cfg: DictConfig) -> DictConfig:
    """The config with no reference left in it, as it may be kept and shown: addresses may hold keys."""
    kept = resolved(cfg)
    for name, urls in addresses_of(kept).items():
        kept.addresses[name] = urls and [shown(url) for url in urls]
    return kept


def addresses_of(cfg: DictConfig) -> Addresses:
    """The addresses that the config sets instead of published ones; configs of earlier runs have none."""
    return plain(cfg.addresses) if "addresses" in cfg else {}


def networks_folder(cfg: DictConfig) -> Path:
    """Where fetched networks lie."""
    return Path(cfg.paths.cache_dir) / "networks"


def _values(cfg: DictConfig, key: str) -> Any:
    """Plain values of a group; None if one is still to be given, which is said together with all that are missing."""
    try:
        values = plain(cfg[key])
    except OmegaConfBaseException:  # a reference to such a value
        return None
    return None if missing_keys(values) else values


def _asked(values: Any, addresses: Addresses) -> Iterator[Need]:
    """The needs of every class in a group, the outermost last."""
    if not isinstance(values, dict):
        return
    for value in values.values():
        yield from _asked(value, addresses)
    ask = getattr(get_object(values["_target_"]), "needs", None) if "_target_" in values else None
    if ask is not None:
        yield from ask(values, addresses)

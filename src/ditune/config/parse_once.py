"""A config file is parsed once: Hydra parses about forty files anew for every config that it composes.

A further config of the same process, such as that of a sweep's next job, is composed in 60 to 80 % of the time. Every
start composes two: the first one tells Hydra whether it is a sweep.
"""

import pickle
from pathlib import Path

from hydra._internal.config_repository import ConfigRepository  # nothing public lies between the files and a config
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource

_from_disk = ConfigRepository.load_config
_parsed: dict[tuple[object, ...], bytes] = {}


def parse_once() -> None:
    """Let Hydra keep what it has parsed of a file until the file changes. A second call changes nothing."""
    ConfigRepository.load_config = _load_config


def _load_config(self: ConfigRepository, config_path: str) -> ConfigResult | None:
    source = self._find_object_source(config_path=config_path, object_type=ObjectType.CONFIG)
    if source is None or source.scheme() not in ("file", "pkg"):  # configs that code registers may change
        return _from_disk(self, config_path)
    key = (source.provider, source.path, config_path, *_state(source, config_path))
    if key not in _parsed:
        _parsed[key] = pickle.dumps(_from_disk(self, config_path))
    return pickle.loads(_parsed[key])  # a config of its own: Hydra changes what it composes


def _state(source: ConfigSource, config_path: str) -> tuple[int, ...]:
    """What differs after a file has changed; the files of an installed package do not change."""
    if source.scheme() != "file":
        return ()
    stat = (Path(source.path) / source._normalize_file_name(config_path)).stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino

"""The values of every config key, as one table; it is asked before anything is built, and imports next to nothing.

The first pattern that fits a key counts, with all rows of that same pattern: one of them must take the value.
"""

from collections.abc import Iterator, Mapping

from omegaconf import DictConfig, ListConfig, OmegaConf, read_write

from ditune.config.command_keys import APART, SHARED_KEYS
from ditune.config.data_keys import check_data
from ditune.config.group_keys import GROUP_KEYS
from ditune.config.kinds import Key, first_fit, shown
from ditune.config.training_keys import TRAINING_KEYS
from ditune.errors import UserError

KEYS = (*TRAINING_KEYS, *GROUP_KEYS, *SHARED_KEYS)


def rows_of(name: str, command: str = "train") -> list[Key]:
    """The rows of the table that say what a key takes; none for a key that the table does not know."""
    for table in (APART.get(command, ()), KEYS):
        first = next((row for row in table if row.matches(name)), None)
        if first is not None:
            return [row for row in table if row.pattern == first.pattern]
    return []


def check(cfg: DictConfig, command: str = "train") -> None:
    """Refuse values of a wrong type or range; whole floats of whole numbers (1e3) become int in the config.

    Keys without a row are those that a user has added; what is built of them refuses what it does not know.

    Args:
        cfg: the config of an entry point, which is changed in place.
        command: the entry point's name.

    Raises:
        UserError: names the key, its value and what it takes.
    """
    with read_write(cfg):
        for name, parent, key in sorted(leaves(cfg), key=lambda leaf: OmegaConf.is_interpolation(leaf[1], leaf[2])):
            _check_leaf(name, parent, key, command)
    check_data(cfg)


def leaves(cfg: DictConfig, path: str = "") -> Iterator[tuple[str, DictConfig, str]]:
    """(dotted name, the config that holds it, its key there) of all values; lists and references are values."""
    for key in cfg:
        name = f"{path}.{key}" if path else str(key)
        if OmegaConf.is_missing(cfg, key) or str(key).startswith("_") or name == "hydra":
            continue  # _target_ and the like belong to Hydra
        yield name, cfg, key
        if not OmegaConf.is_interpolation(cfg, key) and isinstance(cfg[key], DictConfig):
            yield from leaves(cfg[key], name)


def _check_leaf(name: str, parent: DictConfig, key: str, command: str) -> None:
    rows, reference = rows_of(name, command), OmegaConf.is_interpolation(parent, key)
    if reference and (not rows or rows[0].kind is str):
        return  # paths, some of which only a run can resolve; lists of text are values themselves
    value = parent[key]
    if not rows:
        if not isinstance(value, Mapping):
            _check_group(name, value)
        return
    if isinstance(value, DictConfig) and rows[0].kind is dict:
        return
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value, resolve=rows[0].kind is not str)
    read = first_fit(name, value, rows)
    if type(read) is not type(value) or repr(read) != repr(value):
        parent[key] = read


def _check_group(name: str, value: object) -> None:
    inside = [row.pattern.removeprefix(f"{name}.") for row in KEYS if row.pattern.startswith(f"{name}.")]
    if inside:
        raise UserError(f"{name} is {shown(value)}, but must be a group of keys: {', '.join(inside)}.")

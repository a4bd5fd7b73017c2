"""Copies of a public dataset that are not in its official layout: Parquet files, or folders of its classes.

The readers of `data=folder` read them. Whether they are what their folder claims is known by the number of classes and
by the names of the first and the last one. A copy keeps its own split; a dataset with an official split needs one.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ditune.data.layouts import read_items
from ditune.data.parquet import Parquet
from ditune.data.places import folders_below, folders_in
from ditune.data.sources import PARQUET, Item, Source, open_source
from ditune.data.splits import is_split, settle
from ditune.errors import UserError
from ditune.files.download import fetch, record_first_use

COPY = "copy"  # folder below the root that a copy of the hub is fetched into


@dataclass(frozen=True)
class Facts:
    """What is known of a dataset's classes and splits.

    Args:
        title: its name in messages.
        count: number of its classes.
        splits: names of its official splits; () = it has none.
        ends: names of the first and the last class.
        known: names of all classes in order; () = they stand in the official files only.
        left_out: a class that is no class.
        class_name: makes the official name of a class from that of its folder or label.
    """

    title: str
    count: int
    splits: tuple[str, ...]
    ends: tuple[str, str]
    known: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    class_name: Callable[[str], str] = str

    def is_class(self, name: str) -> bool:
        """Whether a folder or label is a class."""
        return _key(name) not in map(_key, self.left_out)


def fetch_copy(address: str, folder: Path) -> None:
    """Fetch a copy of the hub; size and hash of its first use are kept in `<folder>.json` and compared.

    Raises:
        UserError: it cannot be fetched, or is not what was fetched first.
    """
    if not folder.exists():
        address = fetch(address, folder)
    record_first_use(folder, address)


def find_copy(root: Path, facts: Facts) -> Path | None:
    """The folder that holds a copy: `root` with Parquet files, or the folder of class folders; None = there is none."""
    if any(folder.is_dir() and any(folder.glob(f"*{PARQUET}")) for folder in folders_below(root)):
        return root
    for folder in folders_below(root):
        inside = folders_in(folder)
        splits = [entry for entry in inside if is_split(entry.name)]
        if not splits and facts.splits:
            continue  # without its split it is another task
        classes = {entry.name for split in splits for entry in folders_in(split)} or {entry.name for entry in inside}
        if sum(map(facts.is_class, classes)) == facts.count:
            return folder
    return None


def read_copy(folder: Path, facts: Facts) -> tuple[list[str], list[Item], list[str]]:
    """Read a copy.

    Args:
        folder: as `find_copy` has it.
        facts: of the dataset.

    Returns:
        Class names in the order of their labels, all images, and sentences about what was found and decided.

    Raises:
        UserError: the classes are not those of the dataset, or there is no split where there is an official one.
    """
    source = open_source(folder)
    items, _ = read_items(source, None)
    items = [item for item in items if facts.is_class(item.class_name)]
    order, notes = _order(source, {item.class_name for item in items}, facts, folder)
    items = [replace(item, class_name=order[item.class_name], split=_split(item, items, facts)) for item in items]
    unsplit = any(item.split is None for item in items)
    if unsplit and facts.splits:
        raise UserError(
            f"{facts.title} in {folder} has one split, and published are {' and '.join(facts.splits)}. Put the others "
            f"beside it, or use data=folder data.root={folder} with a split by a hash."
        )
    kind = "Parquet files" if isinstance(source, Parquet) else "folders of classes"
    notes.append(
        f"{facts.title} is read from {kind} in {folder}, with "
        + ("a split by a hash." if unsplit else "the split that they have.")
    )
    return list(dict.fromkeys(order.values())), settle(items), notes


def _split(item: Item, items: Sequence[Item], facts: Facts) -> str | None:
    """Some copies call the official test images 'validation'."""
    is_test = item.split == "val" and "val" not in facts.splits and all(other.split != "test" for other in items)
    return "test" if is_test else item.split


def _order(source: Source, found: set[str], facts: Facts, folder: Path) -> tuple[dict[str, str], list[str]]:
    """Official name of each class that was found, in the order of the labels; and a sentence if that is another."""
    if facts.known:
        return _known_order(found, facts, folder), []
    named = source.class_labels() if isinstance(source, Parquet) else None
    order = [name for name in named or sorted(found) if facts.is_class(name)]
    keys = [_key(name) for name in order]
    first, last = map(_key, facts.ends)
    if len(order) != facts.count or first not in keys or last not in keys:
        raise UserError(_other_classes(order, facts, folder))
    names = {name: facts.class_name(name) for name in order}
    if (keys[0], keys[-1]) == (first, last):
        return names, []
    return names, [
        f"The classes in {folder} are in another order than those of {facts.title}, so labels are not those of the "
        "official files."
    ]


def _known_order(found: set[str], facts: Facts, folder: Path) -> dict[str, str]:
    """Match names, or numbers from 0 or 1, to the published classes."""
    numbers = {int(name) for name in found} if all(name.isdecimal() for name in found) else set()
    if numbers and len(numbers) == facts.count and max(numbers) - min(numbers) == facts.count - 1 and min(numbers) <= 1:
        return {name: facts.known[int(name) - min(numbers)] for name in sorted(found, key=int)}
    by_key = {_key(name): name for name in found}
    if len(found) != facts.count or by_key.keys() != {_key(name) for name in facts.known}:
        raise UserError(_other_classes(sorted(found), facts, folder))
    return {by_key[_key(name)]: name for name in facts.known}


def _other_classes(found: Sequence[str], facts: Facts, folder: Path) -> str:
    return (
        f"{folder} does not hold {facts.title}: it has {len(found):,} classes from '{found[0]}' to '{found[-1]}', and "
        f"published are {facts.count:,} from '{facts.ends[0]}' to '{facts.ends[1]}'. Correct data.root, or use "
        f"data=folder data.root={folder}."
    )


def _key(name: str) -> str:
    """What stays of a class name however it is written: without numbers before it, capitals and signs."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"^\d+\.", "", name).lower())

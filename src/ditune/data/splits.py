"""Names of splits, and the split by a hash of the path for what has none of its own."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ditune.errors import UserError

if TYPE_CHECKING:
    from ditune.data.sources import Item

SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval"),
}
NORMAL = {spelling: split for split, spellings in SPELLINGS.items() for spelling in spellings}


def normal_split(name: str) -> str:
    """'train', 'val' or 'test' for their usual spellings in any case; any other name as it is."""
    return NORMAL.get(name.strip().lower(), name)


def is_split(name: str) -> bool:
    """Whether this is a usual spelling of train, val or test."""
    return name.strip().lower() in NORMAL


def refuse_two_spellings(names: Iterable[str], place: object) -> None:
    """Refuse names of which two mean the same split, such as train and training.

    Args:
        names: of splits.
        place: where they are, for the message.

    Raises:
        UserError: two names mean the same split.
    """
    first: dict[str, str] = {}
    for name in sorted(names):
        other = first.setdefault(normal_split(name), name)
        if other != name:
            raise UserError(
                f"'{other}' and '{name}' in {place} both name the split '{normal_split(name)}'. "
                "Put their contents together under one name, or take one away."
            )


def hashed_split(name: str) -> str:
    """'test' for a tenth of all names, by their hash, else 'train'; independent of machine and other files."""
    return "test" if int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % 10 == 0 else "train"


def in_fraction(name: str, fraction: float) -> bool:
    """Whether a file belongs to this share of all files, by a hash of its name: 0.03 lies in 0.1, and 0.1 in 0.3."""
    return int.from_bytes(hashlib.sha256(f"fraction: {name}".encode()).digest()[:8]) < fraction * 2**64


def is_in(item: "Item", split: str) -> bool:
    """Whether an image belongs to a split; 'train.fit' and 'train.val' are parts of 'train'."""
    whole, dot, part = split.partition(".")
    whole = normal_split(whole)
    if not dot:
        return item.split == whole
    held_out = hashed_split(f"held out of {whole}: {item.name}") == "test"
    return item.split == whole and part == ("val" if held_out else "fit")


def settle(items: Sequence["Item"]) -> list["Item"]:
    """Give images without a split one by hash: a tenth is 'test', the rest 'train'.

    A class that would have no training image at all keeps its first image in training.
    """
    splits = [item.split if item.split is not None else hashed_split(item.name) for item in items]
    trained = {item.class_name for item, split in zip(items, splits, strict=True) if split == "train"}
    settled = []
    for item, split in zip(items, splits, strict=True):
        if item.split is None and item.class_name not in trained:
            trained.add(item.class_name)
            split = "train"
        settled.append(item if item.split is not None else replace(item, split=split))
    return settled

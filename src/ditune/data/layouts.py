"""Class and split of every image in a folder or zip file, from its folders or from metadata as Hugging Face writes it.

[train|val|test/]class/.../image.png              folders: splits under any of their usual names, then classes
metadata.csv or .jsonl                            one table with file_name, at the top, in any case
train/metadata.csv, test/metadata.csv             one table for each folder, with names relative to it
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ditune.data.formats import count_kinds, describe_kinds, is_image, is_metadata, remedies
from ditune.data.metadata import Table, read_table
from ditune.data.parquet import Parquet
from ditune.data.sources import ONE_CLASS, Item, Source
from ditune.data.splits import is_split, normal_split, refuse_two_spellings
from ditune.errors import UserError

SHOWN = 5  # names in a message


def read_items(source: Source, class_column: str | None, classes: Collection[str] = ()) -> tuple[list[Item], list[str]]:
    """The images of a source, sorted by name, and sentences about what was left out or decided.

    Args:
        source: where they lie.
        class_column: column of the metadata that names the class; None = the first folder.
        classes: names that are known to be classes; if all top folders are among them, none of these is a split.

    Returns:
        (images, sentences).

    Raises:
        UserError: there are no images, or folders, tables and settings do not fit together.
    """
    if isinstance(source, Parquet):
        items, notes = source.items(class_column)
        return items, [*source.notes, *notes]
    notes = list(source.notes)
    tables = _tables(source, class_column, notes)
    if tables:
        items = _from_tables(source, tables, class_column, classes, notes)
    elif class_column is not None:
        raise UserError(
            f"The class is asked from the column '{class_column}', but there is no metadata.csv or metadata.jsonl in "
            f"{source.path} or in its folders. There are: {_listing(source)}. Write one with the columns file_name and "
            f"{class_column}, or leave class_column out to take the folders' names."
        )
    else:
        items = _from_folders(source, classes, notes)
    if not items:
        raise UserError(_nothing(source))
    return sorted(items, key=lambda item: item.name), notes


# Folders


@dataclass(frozen=True)
class Splits:
    """The split of each top folder.

    Args:
        folders: split by the name of its folder; {} = no folder is a split.
    """

    folders: dict[str, str]

    def place(self, name: str) -> tuple[str, str | None]:
        """Path inside the split's folder, and the split; None = by hash."""
        top, _, inside = name.partition("/")
        if top not in self.folders:
            return name, None
        alone = set(self.folders.values()) == {"train"}
        return inside, None if alone else self.folders[top]

    def note(self, source: Source) -> list[str]:
        """A sentence if train/ is the only folder, so that a part of it is 'test'; else none."""
        if set(self.folders.values()) != {"train"}:
            return []
        return [
            f"There is only {next(iter(self.folders))}/ in {source.path}: a tenth of it, by a hash of the path, is the "
            "split 'test'."
        ]


def _splits(source: Source, names: Sequence[str], classes: Collection[str], strict: bool) -> Splits:
    """Which top folders are splits: all or none of them.

    Args:
        source: for messages.
        names: of images.
        classes: names that are known to be classes.
        strict: refuse a mixture of splits and others; else it has no splits.
    """
    tops = sorted({name.partition("/")[0] for name in names if "/" in name})
    found = [top for top in tops if is_split(top)]
    others = [top for top in tops if not is_split(top)]
    if not found or set(tops) <= set(classes):
        return Splits({})
    loose = [name for name in names if "/" not in name]
    if others or loose:
        if not strict:
            return Splits({})
        beside = f"the folder '{others[0]}'" if others else f"the image {loose[0]}"
        raise UserError(
            f"Splits and classes cannot be told apart in {source.path}: {' and '.join(map(repr, found))} are names of "
            f"splits, and {beside} lies beside. Leave only splits at the top (train, val, test), or give all of them "
            "other names; if they are all classes, list them in data.classes."
        )
    refuse_two_spellings(found, source.path)
    return Splits({top: normal_split(top) for top in found})


def _from_folders(source: Source, classes: Collection[str], notes: list[str]) -> list[Item]:
    names = [name for name in source.names if is_image(name)]
    splits = _splits(source, names, classes, strict=True)
    items = [_from_folder(source, name, splits) for name in names]
    _refuse_loose(items, splits)
    _refuse_splits_as_classes(items, splits, classes)
    notes += splits.note(source)
    return items


def _from_folder(source: Source, name: str, splits: Splits) -> Item:
    inside, split = splits.place(name)
    return Item(source, name, _first_folder(inside), split, {"file_name": name})


def _first_folder(name: str) -> str:
    folder, slash, _ = name.partition("/")
    return folder if slash else ONE_CLASS


def _is_loose(item: Item, splits: Splits) -> bool:
    return "/" not in splits.place(item.name)[0]


def _refuse_loose(items: Sequence[Item], splits: Splits) -> None:
    """Images beside class folders have no class."""
    loose = [item for item in items if _is_loose(item, splits)]
    if not 0 < len(loose) < len(items):
        return
    name, path = loose[0].name, loose[0].source.path
    flat = {item.name.partition("/")[0] for item in loose if splits.folders}
    deep = {item.name.partition("/")[0] for item in items if not _is_loose(item, splits)}
    if flat and not flat & deep:
        raise UserError(
            f"The image {name} in {path} lies in no folder of a class, while {min(deep)}/ has them. Move the "
            f"images of {min(flat)}/ into folders of their classes, or take {min(flat)}/ away."
        )
    raise UserError(f"The image {name} in {path} lies beside the folders of the classes. Move it into one of them.")


def _refuse_splits_as_classes(items: Sequence[Item], splits: Splits, classes: Collection[str]) -> None:
    names = {item.class_name for item in items}
    if splits.folders and names and all(is_split(name) for name in names) and not names <= set(classes):
        raise UserError(
            f"The classes in {items[0].source.path} would be named {', '.join(sorted(names))}: there are folders of "
            f"splits inside of folders of splits ({items[0].name}). Move their contents up by one."
        )


# Tables


def _tables(source: Source, class_column: str | None, notes: list[str]) -> dict[str, str]:
    """The metadata file of each folder ('' = the top) that is to be read.

    One at the top holds for everything. Those of folders are read when a class column is asked for; without one, the
    folders say as much.
    """
    found = [name for name in source.names if is_metadata(name)]
    used = {"": _one_of([name for name in found if "/" not in name], source)}
    if not used[""]:
        used = {}
        folders = sorted({name.partition("/")[0] for name in found if name.count("/") == 1})
        if class_column is not None:
            used = {folder: _one_of([n for n in found if n.rpartition("/")[0] == folder], source) for folder in folders}
    ignored = [name for name in found if name not in used.values()]
    if ignored and (used or class_column is None):
        why = f"{next(iter(used.values()))} is" if used else "class_column is not set"
        notes.append(f"{', '.join(ignored[:SHOWN])} in {source.path} is not read, because {why}.")
    return used


def _one_of(names: Sequence[str], source: Source) -> str:
    """The metadata file of a folder; '' = there is none."""
    exact = [name for name in names if name.rpartition("/")[2] == "metadata.csv"]
    if len(names) > 1 and not exact:
        raise UserError(f"{source.path} holds {' and '.join(names[:2])}. Keep one of them.")
    return next(iter(exact or names), "")


def _from_tables(
    source: Source, names: dict[str, str], class_column: str | None, classes: Collection[str], notes: list[str]
) -> list[Item]:
    """One item for each row; images that no row names are left out."""
    present = [name for name in source.names if is_image(name)]
    _refuse_folders_without(source, present, names, class_column)
    tables = [read_table(source, name, folder) for folder, name in names.items()]
    for table in tables:
        table.need(*(["file_name"] + [class_column] * (class_column is not None)))
    files = [(table, row, table.file_of(row)) for table in tables for row in table.rows]
    strict = class_column is None and not any("split" in table.columns for table in tables)
    splits = _splits(source, [file for _, _, file in files], classes, strict)
    items = [_from_row(table, row, file, class_column, splits) for table, row, file in files]
    if any(item.split is None for item in items):
        notes += splits.note(source)
    unnamed = sorted(set(present) - {file for _, _, file in files})
    if unnamed:
        notes.append(
            f"Images left out of {source.path}, because {', '.join(names.values())} does not name them: "
            f"{len(unnamed):,} ({some(unnamed)})."
        )
    blank = sum(item.split == "" for item in items)
    if blank:
        notes.append(f"Rows of the metadata in {source.path} without a split, whose images are in none: {blank:,}.")
    return items


def _refuse_folders_without(
    source: Source, present: Sequence[str], names: dict[str, str], class_column: str | None
) -> None:
    """Where folders have tables of their own, each folder of images needs one."""
    if "" in names:
        return
    lacking = [name for name in present if name.partition("/")[0] not in names or "/" not in name]
    if lacking:
        where = f"the folder '{lacking[0].partition('/')[0]}'" if "/" in lacking[0] else f"the image {lacking[0]}"
        raise UserError(
            f"The class is asked from the column '{class_column}', but {where} in {source.path} has no metadata, while "
            f"there is {next(iter(names.values()))}. Write metadata for it, or take it away."
        )


def _from_row(table: Table, row: dict[str, str], file: str, class_column: str | None, splits: Splits) -> Item:
    inside, split = splits.place(file)
    class_name = row[class_column] if class_column else _first_folder(inside)
    if not class_name:
        raise UserError(
            f"Row {table.line(row)} of {table.name} in {table.source.path} has nothing in the column '{class_column}'. "
            "Fill it in or remove the row."
        )
    if "split" in table.columns:
        split = normal_split(row["split"])
    return Item(table.source, file, class_name, split, row)


# Messages


def some(names: Sequence[str], count: int = SHOWN) -> str:
    """The first few names of many."""
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _listing(source: Source) -> str:
    """What lies in a source, tables first."""
    tables = [name for name in source.names if name.lower().endswith((".csv", ".tsv", ".json", ".jsonl", ".parquet"))]
    tops = sorted({name.partition("/")[0] + "/" * ("/" in name) for name in source.names if name not in tables})
    return some([*tables[:SHOWN], *tops], 2 * SHOWN) or "no files"


def _nothing(source: Source) -> str:
    """There are no images, and why."""
    kinds = count_kinds(source.others)
    found = f" There are only other files: {describe_kinds(kinds)}." if kinds else ""
    ways = remedies(kinds)
    if ".parquet" in kinds:
        ways = ["Unpack it: Parquet files are read as they are or from a folder."]
    if not ways:
        ways = [
            "Give a folder or zip file with png, jpg, webp, avif, bmp, tiff or gif files, one folder for each class, "
            "or Parquet files."
        ]
    return f"There are no images in {source.path}.{found} {' '.join(ways)}"

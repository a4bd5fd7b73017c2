"""The classes of a dataset: their names, and sentences about classes that nothing trains."""

from collections.abc import Sequence
from pathlib import Path

from ditune.data.layouts import some
from ditune.data.sources import Item
from ditune.errors import UserError

SHOWN = 10  # classes in a message


def read_classes(classes: str | Path | Sequence[str] | None) -> list[str] | None:
    """Class names from a list or a text file with one per line; None for None.

    Raises:
        UserError: the file cannot be read, there is no name, or a name is there twice.
    """
    if classes is None:
        return None
    if isinstance(classes, (str, Path)):
        path = Path(classes).expanduser()
        if not path.is_file():
            raise UserError(f"There is no file {path}, where class names are expected, one a line. Correct the path.")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"The class names in {path} cannot be read ({error}). Save it as UTF-8 text.") from error
        entries = [(f"line {n} of {path}", line.strip()) for n, line in enumerate(lines, start=1) if line.strip()]
    else:
        entries = [(f"place {n} of `classes`", str(name)) for n, name in enumerate(classes, start=1)]
    first: dict[str, str] = {}
    for place, name in entries:
        if name in first:
            raise UserError(f"The class '{name}' in {place} is there already, in {first[name]}. Remove one of them.")
        first[name] = place
    if not first:
        raise UserError("`classes` names no class. Give at least one, or leave it out for the folders' names.")
    return list(first)


def class_names_of(listed: list[str] | None, items: list[Item]) -> list[str]:
    """Class names in the order of their labels.

    Args:
        listed: names that the user gives; None = the sorted names of the images' classes.
        items: images of all splits.

    Raises:
        UserError: an image has a class that is not listed.
    """
    if listed is None:
        return sorted({item.class_name for item in items})
    known = set(listed)
    unknown = next((item for item in items if item.class_name not in known), None)
    if unknown is not None:
        raise UserError(
            f"The image {unknown.name} in {unknown.source.path} has the class '{unknown.class_name}', "
            f"which is not one of the {len(listed)} in `classes`. Add it there, or leave `classes` out."
        )
    return listed


def untrained_classes(class_names: Sequence[str], everything: Sequence[Item], trained_on: Sequence[Item]) -> list[str]:
    """Classes that have images, but none among those that are trained on; none if nothing is trained on."""
    there, trained = ({item.class_name for item in items} for items in (everything, trained_on))
    return [name for name in class_names if name in there - trained] if trained_on else []


def notes_on_classes(class_names: Sequence[str], everything: Sequence[Item], untrained: Sequence[str]) -> list[str]:
    """Sentences about labels that nothing trains."""
    there = {item.class_name for item in everything}
    absent = [name for name in class_names if name not in there]
    return [
        f"{len(names):,} of {len(class_names):,} classes {'has' if len(names) == 1 else 'have'} no {what} and "
        f"will not be learned: {some(names, SHOWN)}."
        for names, what in ((absent, "image at all"), (untrained, "training image"))
        if names
    ]

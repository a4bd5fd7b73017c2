"""Where the folders of a dataset lie when they are deeper than published, as other unpackers and re-uploads leave them.

Every search is two levels deep at most, shallow before deep, by name; hidden folders and __MACOSX are passed over.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from ditune.data.formats import is_hidden
from ditune.data.splits import is_split

DEEPEST = 2  # levels


def folders_in(folder: Path) -> list[Path]:
    """Sorted folders in a folder, without hidden ones; none if it cannot be listed."""
    try:
        return sorted(entry for entry in folder.iterdir() if not is_hidden(entry.name) and entry.is_dir())
    except OSError:
        return []


def folders_below(root: Path, deepest: int = DEEPEST) -> Iterator[Path]:
    """`root`, then its folders, then theirs, down to `deepest` levels."""
    level = [root]
    for depth in range(deepest + 1):
        yield from level
        level = [inner for folder in level for inner in folders_in(folder)] if depth < deepest else []


def find_top(root: Path, tops: Iterable[str], marker: str, deeper: str = "") -> Path | None:
    """The folder of a dataset.

    Args:
        root: where to look.
        tops: names that it may have below `root`.
        marker: a path below it, by which it is recognised among `tops` and as `root` itself.
        deeper: a path that must be there as well elsewhere, for markers that other datasets have too; "" = none.

    Returns:
        The first such folder; None = there is none.
    """
    expected = next((root / top for top in (*tops, "") if (root / top / marker).exists()), None)
    if expected is not None:
        return expected
    places = (folder for folder in folders_below(root) if folder == root or not is_split(folder.name))
    return next((folder for folder in places if (folder / marker).exists() and (folder / deeper).exists()), None)


def locate(name: str, top: Path, root: Path) -> Path | None:
    """The file or folder `name` of a dataset.

    Args:
        name: of the file or folder.
        top: folder of the dataset, where it should be.
        root: a folder above it, or the same; folders between the two are searched as well.

    Returns:
        The one that is nearest to `top`; inside of a folder of its own name that holds it, the inner one. None = there
        is none.
    """
    above = [top, *(parent for parent in top.parents if parent == root or root in parent.parents)]
    found = next((place / name for base in above for place in folders_below(base) if (place / name).exists()), None)
    while found is not None and (found / name).exists():
        found = found / name
    return found


def listing(folder: Path, count: int = 6) -> str:
    """Names in a folder for a message, such as 'images/, meta/, x.csv and 3 more'; 'nothing' for none."""
    if not folder.is_dir():
        return "no folder"
    names = sorted(f"{e.name}/" if e.is_dir() else e.name for e in folder.iterdir() if not is_hidden(e.name))
    more = f" and {len(names) - count:,} more" if len(names) > count else ""
    return (", ".join(names[:count]) or "nothing") + more

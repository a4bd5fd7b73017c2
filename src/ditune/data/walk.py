"""The files below a folder, each once: links are followed, but never give an image twice."""

import heapq
import os
from pathlib import Path

from ditune.data.formats import is_hidden
from ditune.errors import UserError
from ditune.progress import meter


def files_below(root: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the files below `root`, relative and with slashes, and of the links that were ignored.

    Folders come before links to folders. A link to a folder that was visited, or that lies above, is passed over, and
    so is a link to a file that is there already under another name. Hard links are files of their own.

    Raises:
        UserError: a folder cannot be read, or a name is no UTF-8.
    """
    visited = {_identity(folder) for folder in root.resolve().parents}
    names: list[str] = []
    file_links: list[str] = []
    folder_links: list[str] = []  # a heap: what is reached twice keeps the first of its sorted names
    passed: list[str] = []
    todo = [""]
    with meter("listing files", None, "files") as shown:
        while todo or folder_links:
            is_link = not todo
            folder = heapq.heappop(folder_links) if is_link else todo.pop()
            identity = _identity(root / folder)
            if identity in visited:
                passed += [folder] if is_link else []
                continue
            visited.add(identity)
            for entry in _entries(root / folder):
                name = f"{folder}/{entry.name}" if folder else entry.name
                is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
                if entry.is_symlink():
                    heapq.heappush(folder_links, name) if is_folder else file_links.append(name)
                else:
                    (todo if is_folder else names).append(name)
            shown.update(len(names))
    kept, doubled = _resolve(root, names, file_links)
    return sorted(names + kept), sorted(passed + doubled)


def _resolve(root: Path, names: list[str], links: list[str]) -> tuple[list[str], list[str]]:
    """The links to files that lead to something new, and the others; broken ones are new."""
    if not links:
        return [], []
    folders = {folder: os.path.realpath(root / folder) for folder in {os.path.dirname(name) for name in names}}
    there = {os.path.join(folders[os.path.dirname(name)], os.path.basename(name)) for name in names}
    kept, doubled = [], []
    for link in sorted(links):
        target = os.path.realpath(root / link)
        (doubled if target in there else kept).append(link)
        there.add(target)
    return kept, doubled


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if not is_hidden(entry.name)]
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be read ({error}). Allow reading it, or take it away.") from error
    for entry in entries:
        if not _is_utf8(entry.name):
            raise UserError(f"The name of {entry.path!a} is no UTF-8. Rename it.")
    return entries


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino

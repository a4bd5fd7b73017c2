"""Reading, hashing and decoding every image of a dataset once; the manifest names the broken ones."""

import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from ditune.data.images import BROKEN, ImageDataset
from ditune.data.manifest import Check, describe, is_current, read_manifest, write_manifest
from ditune.data.sources import Item
from ditune.data.transforms import decode
from ditune.errors import UserError
from ditune.files.atomic import atomic, write_json
from ditune.files.locks import locked, share
from ditune.progress import meter

log = logging.getLogger(__name__)

PIECE = 512  # images that one process checks at a time
SHOWN = 5  # problems in a message; all are in the report


def verify(dataset: ImageDataset, path: Path, policy: str, again: bool = False) -> None:
    """Write the manifest of all splits of `dataset` to `path`, and report.json beside it.

    What was found is kept in checked.csv beside it; while that is valid, nothing is read again.

    Args:
        dataset: with all its splits, made without a manifest.
        path: of the manifest.
        policy: 'skip' = leave broken images out and report them; 'raise' = stop at them.
        again: read everything again.

    Raises:
        UserError: images are broken and the policy is 'raise'; they are listed in report.json.
    """
    if policy not in ("skip", "raise"):
        raise UserError(f"policy is '{policy}'. Set skip (leave broken images out) or raise (stop at them).")
    items, checked, report = dataset.everything, path.with_name("checked.csv"), path.with_name("report.json")
    if again:
        checked.unlink(missing_ok=True)
    if not is_valid(items, checked):
        _check_all(items, checked, dataset.resolution)
    rows = read_manifest(checked)
    problems = {f"{row['source']}:{row['file_name']}": row["problem"] for row in rows if row["problem"]}
    content = _report(dataset, rows, problems)
    write_json(report, content)
    for sentence in [*getattr(dataset, "incomplete", []), *dataset.notes]:
        log.warning("%s", sentence)
    if problems and policy == "raise":
        first = "; ".join(f"{name.partition(':')[2]}: {text}" for name, text in list(problems.items())[:SHOWN])
        raise UserError(
            f"{len(problems):,} of {len(rows):,} images are broken: {first}. Put whole files there, or leave them "
            f"out with `python src/prepare.py` and policy=skip. All are listed in {report}."
        )
    if problems:
        log.warning("%d broken images are left out; see %s", len(problems), report)
    counts = ", ".join(f"{count:,} in {split}" for split, count in content["pictures"].items())
    log.info("all images can be read: %s; %d classes; more in %s", counts, content["classes"], report)
    if not path.is_file() or path.read_bytes() != checked.read_bytes():
        with atomic(path) as temporary:
            shutil.copyfile(checked, temporary)


def is_valid(items: list[Item], path: Path) -> bool:
    """Whether the manifest `path` lists these images with the sizes of their files."""
    if not path.is_file():
        return False
    try:
        rows = read_manifest(path)
    except UserError as error:
        log.warning("%s", error)
        return False
    if not is_current(items, rows):
        return False
    return all(str(item.source.size(item.name)) == row["bytes"] for item, row in zip(items, rows, strict=True))


def _check_all(items: list[Item], path: Path, resolution: int) -> None:
    pieces = -(-len(items) // PIECE)
    listing = json.dumps([(who, item.source.size(item.name)) for who, item in zip(describe(items), items, strict=True)])
    folder = path.with_name(f".checking-{hashlib.sha256(listing.encode()).hexdigest()[:16]}")

    def work(i: int) -> None:
        part = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for found in pool.map(partial(check, resolution=resolution), items[i * PIECE : (i + 1) * PIECE]):
                part.append(found)
                progress.advance()
        with atomic(folder / f"{i}.json") as temporary:
            temporary.write_text(json.dumps(part), encoding="utf-8")

    with meter("checking images", len(items)) as progress:
        share(folder, pieces, work, lambda: is_valid(items, path))
    with locked(path.with_name(".checked.lock")):
        if not is_valid(items, path):
            parts = (json.loads((folder / f"{i}.json").read_text(encoding="utf-8")) for i in range(pieces))
            write_manifest(path, items, [Check(*entry) for part in parts for entry in part])
        shutil.rmtree(folder, ignore_errors=True)


def check(item: Item, resolution: int) -> Check:
    """Read and decode an image.

    Args:
        item: the image.
        resolution: that it is decoded to.

    Returns:
        Size, hashes, and the problem if there is one.
    """
    try:
        content = item.source.read(item.name)
    except FileNotFoundError:
        return Check(-1, 0, "", "there is no such file")
    except BROKEN as error:
        return Check(item.source.size(item.name), 0, "", f"cannot be read ({_text(error)})")
    found = Check(len(content), zlib.crc32(content), hashlib.sha256(content).hexdigest(), "")
    if not content:
        return found._replace(problem="the file is empty")
    try:
        decode(content, resolution)
    except BROKEN as error:
        return found._replace(problem=_text(error))
    return found


def _text(error: BaseException) -> str:
    """The text of an error in one line, without the address of an object: a manifest is the same file each time."""
    return " ".join(re.sub(r"<[^<>]* object at 0x[0-9a-f]+>", "", str(error)).split()) or type(error).__name__


def _report(dataset: ImageDataset, rows: list[dict[str, str]], problems: dict[str, str]) -> dict:
    sound = [row for row in rows if not row["problem"]]
    splits = sorted({row["split"] for row in rows})
    return {
        "pictures": {split: sum(row["split"] == split for row in sound) for split in splits},
        "classes": len(dataset.class_names),
        "copies": len(sound) - len({row["sha256"] for row in sound}),  # of another image, byte by byte
        "differs_from_published": getattr(dataset, "incomplete", []),
        "left_out": problems,
        "not_images": dataset.not_images,  # files by the end of their names
        "classes_without_training_images": dataset.untrained,
        "notes": dataset.notes,
    }

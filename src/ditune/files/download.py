"""Downloads: resumed where they stopped, and verified before the file gets its name."""

import hashlib
import json
import logging
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from ditune.errors import UserError
from ditune.files.atomic import sha256, write_json
from ditune.progress import meter

log = logging.getLogger(__name__)

ATTEMPTS, PAUSE, TIMEOUT = 5, 2.0, 30.0  # pauses grow: 2, 4, 6, ... seconds
BLOCK = 1 << 20


def fetch(url: str, path: Path, md5: str | None = None) -> None:
    """Download a file; resume from `<path>.part`, if an earlier try has left it.

    Args:
        url: address.
        path: of the file.
        md5: that it must have (hex); None = not checked.

    Raises:
        UserError: it cannot be reached, or its MD5 is another; the message says what to put where by hand.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _download(url, part)
            break
        except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
            final = isinstance(error, HTTPError) and error.code in (401, 403, 404, 410)
            if attempt == ATTEMPTS or final:
                raise UserError(
                    f"{url} cannot be fetched ({error}). Get the file elsewhere and put it at {path}; or run this "
                    "again with a network, it goes on where it stopped."
                ) from error
            log.warning("%s broke off (%s); trying again", url, error)
            time.sleep(PAUSE * attempt)
    if md5 is not None:
        try:
            check_md5(part, md5)
        except UserError:
            part.unlink()  # going on from wrong bytes can never end well
            raise
    part.rename(path)


def _download(url: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"User-Agent": "ditune", **({"Range": f"bytes={have}-"} if have else {})})
    try:
        response = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416 and have:  # nothing is left to send: the part is the whole
            return
        raise
    with response:
        resumed = response.status == 206
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        name = f"fetching {part.name.removesuffix('.part')}"
        with part.open("ab" if resumed else "wb") as file, meter(name, total, "bytes", done=have) as progress:
            while block := response.read(BLOCK):
                file.write(block)
                progress.advance(len(block))
    if total is not None and part.stat().st_size != total:
        raise HTTPException(f"{part.stat().st_size:,} of {total:,} bytes came")


def check_md5(path: Path, expected: str) -> None:
    """Check the MD5 of a file.

    Raises:
        UserError: it is not the expected one (hex).
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != expected:
        raise UserError(
            f"{path} has the MD5 {found}, published is {expected}: it is truncated, damaged or another file. "
            "Delete it and fetch it again."
        )


def record_first_use(path: Path, url: str | None = None) -> dict[str, str | int]:
    """Record size and hash of a file in `<path>.json` at its first use, and compare them later.

    This is for files whose hash is not published.

    Args:
        path: of the file.
        url: where it came from.

    Returns:
        "bytes" and "sha256" of the file.

    Raises:
        UserError: the file has changed since its first use.
    """
    note = path.with_name(path.name + ".json")
    found = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    if note.is_file():
        recorded = json.loads(note.read_text(encoding="utf-8"))
        if any(recorded.get(key) != value for key, value in found.items()):
            raise UserError(
                f"{path} is not the file that was first used ({recorded.get('bytes'):,} bytes then, "
                f"{found['bytes']:,} now). Fetch it again; if the new one is right, delete {note}."
            )
        return found
    write_json(note, found | {"url": url})
    return found

"""Downloads: resumed where they stopped, and verified before the file gets its name."""

import base64
import hashlib
import json
import logging
import re
import time
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from ditune.errors import UserError
from ditune.files import atomic, hub
from ditune.files.atomic import write_json
from ditune.files.hub import HUB
from ditune.progress import meter

log = logging.getLogger(__name__)

ATTEMPTS, PAUSE, TIMEOUT = 5, 2.0, 30.0  # pauses grow: 2, 4, 6, ... seconds
BLOCK = 1 << 20
PROBE = 10.0  # seconds to wait for an answer before anything is fetched
GONE = (401, 403, 404, 410)  # HTTP's answers that trying again does not change
AGENT = {"User-Agent": "ditune"}
USER = re.compile(r"(\w+://)[^/?#\s'\"]*@")
QUERY = re.compile(r"((?:\w+:/)?/[^\s?#'\"]*)[?#][^\s'\"]+")


def shown(text: object) -> str:
    """A text that may be printed and kept: no address in it has its user, password or query, which may be secrets."""
    return QUERY.sub(r"\1?...", USER.sub(r"\1", str(text)))


def fetch(url: str, path: Path, md5: str | None = None, sha256: str | None = None) -> str:
    """Download a file, or a repository of the hub; resume from `<path>.part`, if an earlier try has left it.

    Args:
        url: address: https://, http://, file://, or of the hub, see `ditune.files.hub`; it may hold a user, a password,
            or a key in its query, which no message shows.
        path: of the file; of a folder where the address is that of a repository.
        md5: that it must have (hex); None = not checked.
        sha256: likewise.

    Returns:
        The address; of the hub, with the commit.

    Raises:
        UserError: it cannot be reached, or its hash is another; the message says what to put where by hand.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    if url.startswith(HUB):
        url = _from_the_hub(url, path, part)
    else:
        _from_the_web(url, path, part)
    try:
        if md5 is not None:
            check_md5(part, md5)
        if sha256 is not None:
            check_sha256(part, sha256)
    except UserError:
        part.unlink()  # going on from wrong bytes can never end well
        raise
    part.rename(path)
    return url


def fetch_any(addresses: Sequence[str], path: Path, md5: str | None = None, sha256: str | None = None) -> str:
    """Download a file from the first address that gives it; arguments as in `fetch`.

    Returns:
        The address.

    Raises:
        UserError: no address gives the file; the message is that of the last one.
    """
    for address in addresses[:-1]:
        try:
            return fetch(address, path, md5, sha256)
        except UserError as error:
            log.warning("%s Trying the next address.", error)
    return fetch(addresses[-1], path, md5, sha256)


def reachable(url: str) -> str | None:
    """Why an address does not answer, in a few words; None = it does. Nothing is fetched."""
    if url.startswith(HUB):
        reason = hub.answers(url)
        return None if reason is None else shown(reason)
    try:
        with urlopen(_request(url, "HEAD"), timeout=PROBE):
            return None
    except HTTPError as error:
        return f"HTTP {error.code}" if error.code in GONE else None  # others may refuse the question only
    except (URLError, HTTPException, OSError, ValueError) as error:
        return shown(getattr(error, "reason", error))


def _from_the_web(url: str, path: Path, part: Path) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _download(url, part)
        except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
            final = isinstance(error, HTTPError) and error.code in GONE
            if attempt == ATTEMPTS or final or url.startswith("file:"):
                raise _unfetched(url, path, error) from error
            log.warning("%s broke off (%s); trying again", shown(url), shown(error))
            time.sleep(PAUSE * attempt)
    return None


def _unfetched(url: str, path: Path, reason: object) -> UserError:
    return UserError(
        f"{shown(url)} cannot be fetched ({shown(reason)}). Get the file elsewhere and put it at {path}; or run this "
        "again with a network, it goes on where it stopped."
    )


def _from_the_hub(url: str, path: Path, part: Path) -> str:
    """By huggingface_hub, which knows the hub's mirrors, tokens and cache."""
    try:
        return hub.download(url, part)
    except UserError:
        raise
    except Exception as error:  # its errors are of many kinds
        raise _unfetched(url, path, shown(" ".join(str(error).split()))[:300]) from error


def _request(url: str, method: str = "GET") -> Request:
    """A question to an address; `user:password@` goes into a header, since urllib takes it for a part of the host."""
    user, at, _ = urlsplit(url).netloc.rpartition("@")
    request = Request(USER.sub(r"\1", url), headers=AGENT, method=method)
    if at:
        key = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {key}")  # another host must not see it
    return request


def _download(url: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = _request(url)
    if have:
        request.add_header("Range", f"bytes={have}-")
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


def check_sha256(path: Path, expected: str) -> None:
    """Check the SHA-256 of a file.

    Raises:
        UserError: it is not the expected one (hex).
    """
    found = atomic.sha256(path)
    if found != expected:
        raise UserError(
            f"{path} has the SHA-256 {found}, published is {expected}: it is truncated, damaged or another file. "
            "Delete it and fetch it again."
        )


def record_first_use(path: Path, url: str | None = None) -> dict[str, str | int]:
    """Record size and hash of a file or folder in `<path>.json` at its first use, and compare them later.

    This is for files whose hash is not published.

    Args:
        path: of the file or folder.
        url: where it came from.

    Returns:
        "bytes" and "sha256" of it.

    Raises:
        UserError: the file has changed since its first use.
    """
    note = path.with_name(path.name + ".json")
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    found = {"bytes": sum(file.stat().st_size for file in files), "sha256": atomic.sha256(path)}
    if note.is_file():
        recorded = json.loads(note.read_text(encoding="utf-8"))
        if any(recorded.get(key) != value for key, value in found.items()):
            raise UserError(
                f"{path} is not the file that was first used ({recorded.get('bytes'):,} bytes then, "
                f"{found['bytes']:,} now). Fetch it again; if the new one is right, delete {note}."
            )
        return found
    write_json(note, found | {"url": None if url is None else shown(url)})
    return found

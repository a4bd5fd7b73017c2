"""Files that a run needs, as facts that are known before anything is built, read or fetched.

A class that reads files may have `needs(config, addresses) -> list[Need]`: the plain values of its config, and the
addresses that the user has set instead of the published ones. `ditune.config.needs` asks all classes of a config.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ditune.errors import UserError
from ditune.files.download import fetch_any, reachable, record_first_use, shown
from ditune.files.locks import locked
from ditune.files.published import PUBLISHED
from ditune.progress import amount, console, is_first_rank

log = logging.getLogger(__name__)

Addresses = Mapping[str, Sequence[str] | None]  # of the config's group `addresses`


@dataclass(frozen=True)
class Need:
    """A file or folder that a run needs.

    Args:
        what: it is, as a message names it.
        path: where it lies, or where it is put.
        present: whether it is there.
        addresses: where it can be fetched, in the order of trying; () = by hand only.
        size: in bytes, None = unknown.
        sha256: that it must have (hex); None = none is published.
        licence: of its content; "" = not stated here.
        remedy: sentences that say what to do where it cannot be fetched.
        md5: likewise.
        unpacked: bytes that its dataset needs besides to unpack it, about; None = it is used as it is.
    """

    what: str
    path: Path
    present: bool
    addresses: tuple[str, ...] = ()
    size: int | None = None
    sha256: str | None = None
    md5: str | None = None
    licence: str = ""
    remedy: str = ""
    unpacked: int | None = None

    @property
    def fetchable(self) -> bool:
        """Whether it is missing and has an address."""
        return not self.present and bool(self.addresses)

    @property
    def lost(self) -> bool:
        """Whether it is missing and only a human can bring it."""
        return not self.present and not self.addresses

    def __str__(self) -> str:
        if self.present:
            return f"{self.what}: there, {self.path}"
        if self.lost:
            return f"{self.what}: missing. {self.remedy}"
        size = "of unknown size" if self.size is None else written(self.size)
        hashes = [name for name, value in (("SHA-256", self.sha256), ("MD5", self.md5)) if value]
        known = f"{hashes[0]} is compared" if hashes else "no hash is published: that of the first use is kept"
        licence = f"; licence: {self.licence.rstrip('.')}" if self.licence else ""
        return f"{self.what}: to be fetched, {size}, from {shown(self.addresses[0])} to {self.path} ({known}){licence}"


def published_need(
    name: str, what: str, path: Path, addresses: Addresses, file: str = "", present: bool = False
) -> Need:
    """The need of a file in `PUBLISHED`.

    Args:
        name: there, and in the config's `addresses`.
        what: see `Need`.
        path: of the file.
        addresses: of the config.
        file: its name, if several are published together; their addresses are those of a folder.
        present: whether it is there although there is nothing at `path`.
    """
    facts = PUBLISHED[name]
    size, sha256 = facts.files[file]
    where = tuple(addresses.get(name) or facts.addresses)
    urls = tuple(f"{url.rstrip('/')}/{file}" for url in where) if file else where
    remedy = f"Put {shown(urls[0])} at {path}, or set addresses.{name}=[<other address>]."
    there = present or path.is_file()
    return Need(what, path, there, urls, size, sha256, licence=facts.licence, remedy=remedy)


def bring(need: Need) -> None:
    """Fetch a need that is missing; processes that start at once share the file.

    Raises:
        UserError: no address works, or the file has another hash.
    """
    with locked(need.path.with_name(f".{need.path.name}.lock")):
        if need.path.exists():
            return
        url = fetch_any(need.addresses, need.path, sha256=need.sha256)
        if need.sha256 is None:
            found = record_first_use(need.path, url)
            log.info("%s: no hash is published; the SHA-256 of this first use is kept: %s", need.path, found["sha256"])


def fetch_all(needs: Sequence[Need]) -> None:
    """Fetch what is missing, but for the archives of datasets, which their dataset fetches and unpacks."""
    for need in needs:
        if need.fetchable and need.unpacked is None:
            bring(need)


def describe_needs(needs: Sequence[Need]) -> None:
    """Show each need on a line."""
    if is_first_rank():
        show = console(soft_wrap=True)
        show.print("this needs:")
        for need in needs:
            show.print(f"  {need}")


def with_reasons(needs: Sequence[Need], probe: Callable[[str], str | None] = reachable) -> list[Need]:
    """The needs; those that no address answers for have none any more, and the reason in their remedy.

    Args:
        needs: of a run.
        probe: address -> why it does not answer; None = it does.
    """
    missing = [need for need in needs if need.fetchable]
    if not missing:
        return list(needs)
    with ThreadPoolExecutor(len(missing)) as pool:
        found = dict(zip((need.path for need in missing), pool.map(lambda n: _reason(n, probe), missing), strict=True))
    return [
        need
        if found.get(need.path) is None
        else replace(need, addresses=(), remedy=f"{found[need.path]} {need.remedy}")
        for need in needs
    ]


def _reason(need: Need, probe: Callable[[str], str | None]) -> str | None:
    """Why none of the addresses can be used, as a sentence; None = one can."""
    reasons = []
    for address in need.addresses:
        reason = probe(address)
        if reason is None:
            return None
        reasons.append(reason)
    return f"No address answers ({'; '.join(dict.fromkeys(reasons))})."


def written(size: int) -> str:
    """A size for people: 547 bytes, 95.6 MB."""
    return amount(size, "bytes") if size >= 100_000 else f"{size:,} bytes"


def missing_bytes(needs: Sequence[Need]) -> dict[Path, int]:
    """Bytes that fetching and unpacking take, by the path that they go to."""
    return {need.path: (need.size or 0) + (need.unpacked or 0) for need in needs if need.fetchable}


def refuse(problems: Sequence[str], what: str) -> None:
    """Raise one UserError of all problems, if there are any.

    Args:
        problems: sentences.
        what: that cannot be done: "This run cannot start".
    """
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        raise UserError("\n".join([f"{what}, for {len(problems)} reasons:", *(f"- {text}" for text in problems)]))

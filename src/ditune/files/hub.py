"""Addresses of the Hugging Face hub: hf://[datasets/]<owner>/<repository>[@<revision>][/<file>].

An address without a file stands for the repository: its safetensors, Parquet and JSON files, so no pickle is fetched.
What is fetched belongs to one commit: a branch is resolved to its commit first, and the commit stands in the record
of the first use (`<path>.json`, with size and SHA-256). A branch that moves changes nothing that has been fetched.
"""

import logging
import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from ditune.errors import UserError

log = logging.getLogger(__name__)

HUB = "hf://"
KINDS = {"model": "", "dataset": "datasets/"}  # repo_type -> how its addresses begin
PATTERNS = {"model": ["*.safetensors", "*.json"], "dataset": ["data/train-*", "data/test-*", "data/val*"]}
COMMIT = re.compile(r"[0-9a-f]{40}")
NAME = re.compile(r"[\w.-]+")
PROBE = 10.0  # seconds to wait for an answer before anything is fetched


@dataclass(frozen=True)
class Address:
    """A place on the hub.

    Args:
        kind: "model" or "dataset".
        repository: <owner>/<name>.
        revision: branch, tag or commit; None = the main branch.
        file: path in the repository; "" = the whole repository.
    """

    kind: str
    repository: str
    revision: str | None
    file: str

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{HUB}{KINDS[self.kind]}{self.repository}{revision}{'/' if self.file else ''}{self.file}"

    @property
    def folder_name(self) -> str:
        """Name of its own in a folder of fetched files."""
        return str(self).removeprefix(HUB).replace("/", "--")

    @property
    def is_pinned(self) -> bool:
        """Whether it names a commit."""
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None


def is_address(name: object) -> bool:
    """Whether a text is an address of the hub."""
    return isinstance(name, str) and name.startswith(HUB)


def parse(address: str) -> Address:
    """The parts of an address.

    Raises:
        UserError: it is none, or its parts could lead out of a folder.
    """
    kind = "dataset" if address.startswith(HUB + KINDS["dataset"]) else "model"
    owner, _, rest = address.removeprefix(HUB + KINDS[kind]).partition("/")
    place, _, file = rest.partition("/")
    name, _, revision = place.partition("@")
    parts = [owner, name, *(file.split("/") if file else [])]
    valid = all(NAME.fullmatch(part) and part.strip(".") for part in parts if part in (owner, name))
    if not valid or any(part in ("", ".", "..") or "\\" in part for part in parts):
        raise UserError(f"{address} is no address of the hub. Write hf://<owner>/<repository>[@<revision>][/<file>].")
    return Address(kind, f"{owner}/{name}", revision or None, file)


def endpoint() -> str | None:
    """The hub's own address, HF_ENDPOINT for a mirror; None = huggingface.co."""
    return os.environ.get("HF_ENDPOINT") or None


def pinned(address: Address) -> Address:
    """The same address at the commit that its revision stands for now."""
    if address.is_pinned:
        return address
    from huggingface_hub import HfApi  # here and below: it takes a second, and few runs need it

    info = HfApi(endpoint=endpoint()).repo_info(
        address.repository, revision=address.revision, repo_type=address.kind, timeout=PROBE
    )
    log.info("%s is commit %s; @%s pins it", address, info.sha, info.sha)
    return replace(address, revision=info.sha)


def download(url: str, part: Path) -> str:
    """Fetch an address to `part`, a file, or a folder where it names a repository.

    Returns:
        The address with its commit.

    Raises:
        Exception: of huggingface_hub, of many kinds.
        UserError: the address is none, or the repository has no file that can be read.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    address = pinned(parse(url))
    common = {"revision": address.revision, "repo_type": address.kind, "endpoint": endpoint()}
    folder = part.with_name(f".{part.name}.hub")  # beside it, so that a rename is enough; kept to go on from
    if address.file:
        Path(hf_hub_download(address.repository, address.file, local_dir=folder, **common)).replace(part)
        shutil.rmtree(folder, ignore_errors=True)
        return str(address)
    snapshot_download(address.repository, local_dir=folder, allow_patterns=PATTERNS[address.kind], **common)
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    if not folder.is_dir() or not any(folder.iterdir()):
        raise UserError(f"{url} has none of {', '.join(PATTERNS[address.kind])}. Name one of its files.")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed before its renaming
    folder.rename(part)
    return str(address)


def answers(url: str) -> str | None:
    """Why an address does not answer, in a few words; None = it does. Nothing is fetched."""
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    address = parse(url)
    try:
        if address.file:
            where = hf_hub_url(
                address.repository,
                address.file,
                repo_type=address.kind,
                revision=address.revision,
                endpoint=endpoint(),
            )
            get_hf_file_metadata(where, timeout=PROBE)
        else:
            HfApi(endpoint=endpoint()).repo_info(
                address.repository, revision=address.revision, repo_type=address.kind, timeout=PROBE
            )
    except Exception as error:  # noqa: BLE001 - its errors are of many kinds, and what they say is passed on
        return " ".join(str(error).split())[:200]
    return None

"""Published networks by name or address: found in a folder, or downloaded once; their hashes are recorded then."""

from pathlib import Path

from ditune.errors import UserError
from ditune.files import hub
from ditune.files.download import record_first_use
from ditune.files.needs import Addresses, Need, bring, published_need
from ditune.files.published import PUBLISHED as FILES

NAMES = ("dit_xl_2_256", "dit_xl_2_512")  # in the same order as their files were published
PUBLISHED = {name: FILES[name].addresses[0] for name in NAMES}  # name: address of its file
OWN = "network.safetensors"  # of a repository that src/publish.py has written
NETWORKS = dict.fromkeys(NAMES, "dit_xl_2")  # name: its network, as configs/network/ calls it


def path_of(name: str, folder: Path | str) -> Path:
    """Where a network file lies: `name` itself, or a published one in `folder`; of the hub, file or repository."""
    if hub.is_address(name):
        return Path(folder) / "hub" / hub.parse(name).folder_name
    return Path(folder) / PUBLISHED[name].rpartition("/")[2] if name in PUBLISHED else Path(name)


def needs(name: str, folder: Path | str, addresses: Addresses) -> list[Need]:
    """The file of a pretrained network; see `ditune.files.needs`.

    Args:
        name: a path, a name in `PUBLISHED`, or an address of the hub.
        folder: where published files lie.
        addresses: of the config.
    """
    path, what = path_of(name, folder), f"network {name}"
    if hub.is_address(name):
        return [Need(what, path, path.exists(), (name,), remedy=f"Put it at {path}, or correct the address.")]
    if name in PUBLISHED:
        return [published_need(name, what, path, addresses)]
    remedy = f"There is no network file {path}. Correct pretrained=, or give one of {', '.join(PUBLISHED)}."
    return [Need(what, path, path.exists(), remedy=remedy)]


def locate(name: str, folder: Path | str, download: bool = True) -> Path:
    """Path of a network file.

    Args:
        name: a path, which is returned as it is; a name in `PUBLISHED`; or an address of the hub.
        folder: where published files lie.
        download: whether a published file that is missing may be downloaded.

    Raises:
        UserError: a published file is missing and cannot or may not be downloaded, or has changed since its first use.
    """
    if name not in PUBLISHED and not hub.is_address(name):
        return Path(name)
    (need,) = needs(name, folder, {})
    if not need.present:
        if not download:
            raise UserError(f"The network {name} is not there. {need.remedy}")
        bring(need)
    record_first_use(need.path, PUBLISHED.get(name, name))
    own = need.path / OWN
    return own if own.is_file() else need.path


def locate_adapter(name: str, folder: Path | str) -> Path:
    """Folder of an adapter: a run's `adapter/`, a run itself, or one of the hub, which is fetched.

    Args:
        name: a path, or an address of the hub.
        folder: where fetched adapters lie.

    Raises:
        UserError: the adapter cannot be fetched, or has changed since its first use.
    """
    path = locate(name, folder) if hub.is_address(name) else Path(name).expanduser()
    return path / "adapter" if (path / "adapter").is_dir() else path

"""Published networks by name: found in a folder, or downloaded once; their hashes are recorded then."""

from pathlib import Path

from ditune.errors import UserError
from ditune.files.download import fetch, record_first_use

ADDRESS = "https://dl.fbaipublicfiles.com/DiT/models"
# name: its file. Licence of the weights: CC-BY-NC 4.0 (facebookresearch/DiT).
PUBLISHED = {
    "dit_xl_2_256": f"{ADDRESS}/DiT-XL-2-256x256.pt",
    "dit_xl_2_512": f"{ADDRESS}/DiT-XL-2-512x512.pt",
}


def locate(name: str, folder: Path | str, download: bool = True) -> Path:
    """Path of a network file.

    Args:
        name: a path, which is returned as it is; or a name in `PUBLISHED`.
        folder: where published files lie.
        download: whether a published file that is missing may be downloaded.

    Raises:
        UserError: a published file is missing and cannot or may not be downloaded, or has changed since its first use.
    """
    if name not in PUBLISHED:
        return Path(name)
    url = PUBLISHED[name]
    path = Path(folder) / url.rpartition("/")[2]
    if not path.is_file():
        if not download:
            raise UserError(f"The network {name} is not there. Put {url} at {path}, or start without dry_run.")
        fetch(url, path)
    record_first_use(path, url)
    return path

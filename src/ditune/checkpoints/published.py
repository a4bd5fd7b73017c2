"""Published networks by name: found where they were put, or fetched once; their hashes are recorded then."""

from pathlib import Path

from ditune.errors import UserError
from ditune.files import download as fetch  # the module: it imports this package, and may be half loaded here

ADDRESS = "https://dl.fbaipublicfiles.com/DiT/models"
# name: its file. Licence of the weights: CC-BY-NC 4.0 (facebookresearch/DiT).
PUBLISHED = {
    "dit_xl_2_256": f"{ADDRESS}/DiT-XL-2-256x256.pt",
    "dit_xl_2_512": f"{ADDRESS}/DiT-XL-2-512x512.pt",
}


def locate(name: str, folder: Path | str, download: bool = True) -> Path:
    """Path of a network: `name` itself, unless it is the name of a published one, which lies in `folder`.

    Raises:
        UserError: it is not there and is not to be fetched or cannot be; or it has changed since its first use.
    """
    if name not in PUBLISHED:
        return Path(name)
    url = PUBLISHED[name]
    path = Path(folder) / url.rpartition("/")[2]
    if not path.is_file():
        if not download:
            raise UserError(f"The network {name} is not there. Put {url} at {path}, or start without dry_run.")
        fetch.fetch(url, path)
    fetch.record_first_use(path, url)
    return path

"""Keys that every data config has, so that a sweep over datasets can set them, though not every dataset uses them."""

import json

from omegaconf import DictConfig, OmegaConf

from ditune.errors import UserError

SHARED = ("root", "class_column", "classes")


def unused(data: DictConfig) -> list[str]:
    """The shared keys that nothing in a data config refers to: they decide nothing.

    Args:
        data: with its references, as composed.
    """
    text = json.dumps(OmegaConf.to_container(data, resolve=False))
    return [key for key in SHARED if key in data and f"${{data.{key}}}" not in text]


def check_data(cfg: DictConfig) -> None:
    """Refuse a value for a key that the data does not use, and null for the folder that it needs.

    Raises:
        UserError: names the key and what to do.
    """
    data = cfg.get("data")
    if not isinstance(data, DictConfig):
        return
    idle = unused(data)
    for key in idle:
        if not OmegaConf.is_missing(data, key) and data[key] is not None:
            raise UserError(
                f"data.{key} is set, but data={data.get('name')} does not use it. Choose data=folder for your own "
                f"images, or leave data.{key} out."
            )
    if "root" in data and "root" not in idle and not OmegaConf.is_missing(data, "root") and data.root is None:
        raise UserError("data.root is null, but this data lies in a folder. Give its path.")

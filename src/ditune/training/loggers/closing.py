"""What loggers of optional packages share: refused with the command that installs them, closed with the result."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from PIL import Image

from ditune.errors import UserError


class Closing(ABC):
    """A logger whose run ends with the training's result, and which takes images."""

    @abstractmethod
    def show(self, name: str, image: Image.Image, step: int) -> None:
        """Send an image.

        Args:
            name: what it shows.
            image: of any size.
            step: of the training.
        """

    @abstractmethod
    def close(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """End the run.

        Args:
            summary: numbers of result.json, and the status.
            exit_code: 0 = finished.
        """


def require_package(module: str, requirement: str) -> None:
    """Refuse a logger whose package is missing.

    Args:
        module: that it imports.
        requirement: for pip.

    Raises:
        UserError: the package is not installed.
    """
    if find_spec(module) is None:
        raise UserError(f'logger={module} needs the package {module}. Install it: pip install "{requirement}"')


def flattened(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested values by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flattened(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return flat

"""One file or folder of weights, opened at most once and without executing anything, for the recognisers of formats."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ditune.errors import UserError


@dataclass(frozen=True)
class Content:
    """A network as a file holds it: `build(**config)` takes `tensors` as its state dict."""

    build: Callable[..., nn.Module]
    config: dict[str, Any]
    tensors: dict[str, Tensor]


class Source:
    """Path of a checkpoint, and what is in it by its container.

    path     a file or a folder
    header   metadata of a safetensors file, else {}
    content  tensors of a safetensors file, or the object of a `.pt` file, read as weights only

    Raises UserError when there is nothing at the path, or it is damaged.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"There is no network file {path}. Check the path, or restore it from the repository.")

    @cached_property
    def is_safetensors(self) -> bool:
        return self.path.is_file() and self.path.suffix == ".safetensors"

    @cached_property
    def header(self) -> dict[str, str]:
        if not self.is_safetensors:
            return {}
        try:
            with safe_open(self.path, framework="pt") as file:
                return file.metadata() or {}
        except SafetensorError as error:
            raise self.damaged(error) from error

    @cached_property
    def content(self) -> Any:
        if self.path.is_dir():
            return {}
        try:
            if self.is_safetensors:
                with safe_open(self.path, framework="pt") as file:
                    return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise self.damaged(error) from error

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The state dict: the content itself, or its "ema" or "model", "ema" first; {} where it is something else."""
        content = self.content if isinstance(self.content, dict) else {}
        found = content.get("ema", content.get("model", content))
        return found if isinstance(found, dict) else {}

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of a folder; {} where it is not there."""
        path = self.path / name
        if not path.is_file():
            return {}
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise self.damaged(error) from error

    def damaged(self, error: object) -> UserError:
        return UserError(f"{self.path} is damaged, or holds more than tensors: {error}. Fetch it again.")

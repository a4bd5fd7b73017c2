"""A hash of what our safetensors files hold: the format itself would not notice a flipped bit.

Each tensor has a hash of its own, so that they can be hashed in any order, while they are copied.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

KEY = "content_sha256"


class ContentHash:
    """Collects tensors and facts.

    Args:
        facts: what a file says about its tensors, as JSON holds it; its `KEY` does not count.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._facts = {key: value for key, value in facts.items() if key != KEY}
        self._lines: list[str] = []

    def add(self, name: str, tensor: Tensor) -> Tensor:
        """Add a tensor; returns it."""
        content = hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        self._lines.append(f"{json.dumps(name)} {tensor.dtype} {tuple(tensor.shape)} {content}\n")
        return tensor

    def hexdigest(self) -> str:
        """SHA-256 of everything that was added."""
        return hashlib.sha256("".join([_text(self._facts), *sorted(self._lines)]).encode()).hexdigest()


def content_hash(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str:
    """The hash of tensors and facts.

    Args:
        tensors: by name.
        facts: see `ContentHash`; what JSON would change in them (tuples, keys that are numbers) does not matter.
    """
    found = ContentHash(json.loads(json.dumps(facts)))
    for name, tensor in tensors.items():
        found.add(name, tensor)
    return found.hexdigest()


def _text(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True) + "\n"

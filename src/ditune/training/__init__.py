"""From the objects of a run to its weights: the LightningModule, its callbacks, EMA, checkpoints and resuming."""

from importlib import import_module
from typing import Any

# Lightning takes seconds to import, and a command that only generates images needs the objects of a run alone.
PLACES = {
    "Balance": "ditune.moe.balance",
    "Ema": "ditune.training.ema",
    "GenerativeModule": "ditune.training.module",
    "Sparsity": "ditune.training.sparsity",
}

__all__ = ["Balance", "Ema", "GenerativeModule", "Sparsity"]


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PLACES[name]), name)

"""What trains: one file per method, behind one small interface."""

from collections.abc import Callable
from functools import partial

from .base import PeftMethod
from .bitfit import BitFit
from .bottleneck import Adapter, AdaptFormer
from .difffit import DiffFit
from .full import Full
from .norm import NormTuning
from .vpt import VPT

METHODS: dict[str, Callable[..., PeftMethod]] = {
    "full": Full,
    "bitfit": BitFit,
    "difffit": DiffFit,
    "adaptformer": AdaptFormer,
    "adapter": Adapter,
    "vpt_deep": partial(VPT, deep=True),
    "vpt_shallow": partial(VPT, deep=False),
    "norm": NormTuning,
}


def build_peft(name: str, **kwargs) -> PeftMethod:
    """The method called `name`, one of `METHODS`; `kwargs` go to its constructor, which refuses unknown ones."""
    return METHODS[name](**kwargs)


__all__ = [
    "METHODS",
    "VPT",
    "AdaptFormer",
    "Adapter",
    "BitFit",
    "DiffFit",
    "Full",
    "NormTuning",
    "PeftMethod",
    "build_peft",
]

"""What trains: one file per method, behind one small interface."""

from .base import PeftMethod
from .bitfit import BitFit
from .difffit import DiffFit
from .full import Full

METHODS: dict[str, type[PeftMethod]] = {"full": Full, "bitfit": BitFit, "difffit": DiffFit}


def build_peft(name: str, **kwargs) -> PeftMethod:
    """The method called `name`, one of `METHODS`; `kwargs` go to its constructor, which refuses unknown ones."""
    return METHODS[name](**kwargs)


__all__ = ["METHODS", "BitFit", "DiffFit", "Full", "PeftMethod", "build_peft"]

"""Where a network's modules and parameters hang, so that a change of its structure can be undone, or swapped in a call.

Every method adapts a network by filling slots: it replaces modules or parameters, or adds some. So an adapter is the
slots that differ from the base's, and to switch between adapters is to put other objects into them; nothing is copied.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# (module, the dict of it, name): what hangs there
Slots = dict[tuple[nn.Module, str, str], Any]
# plain attributes of a network that change with its adaptation
ATTRIBUTES = ("num_classes", "config", "adaptation")


def slots(network: nn.Module) -> Slots:
    """Everything that hangs anywhere in the network now."""
    found = {(network, "__dict__", name): network.__dict__.get(name) for name in ATTRIBUTES}
    for module in network.modules():
        for kind in ("_modules", "_parameters"):
            found |= {(module, kind, name): value for name, value in getattr(module, kind).items()}
    return found


def difference(network: nn.Module, before: Slots) -> Slots:
    """What hangs otherwise in the network than `before`; the insides of new modules are not listed."""
    modules = {module for module, _, _ in before}
    return {
        slot: value
        for slot, value in slots(network).items()
        if slot[0] in modules and (slot not in before or before[slot] is not value)
    }


def fill(content: Slots) -> None:
    for (module, kind, name), value in content.items():
        getattr(module, kind)[name] = value


def undo(change: Slots, before: Slots) -> None:
    """Make the slots of `change` what they were `before`."""
    for module, kind, name in change:
        if (module, kind, name) in before:
            getattr(module, kind)[name] = before[module, kind, name]
        else:
            del getattr(module, kind)[name]


@contextmanager
def all_or_nothing(network: nn.Module) -> Iterator[None]:
    """A change of the network's structure that fails leaves no trace of itself."""
    before, trained = slots(network), {p: p.requires_grad for p in network.parameters()}
    try:
        yield
    except BaseException:
        undo(difference(network, before), before)
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
        raise

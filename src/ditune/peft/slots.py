"""Slots: the places of a network's modules and parameters, by which a change of its structure is undone or swapped.

Every method adapts a network by filling slots: it replaces modules or parameters, or adds some. An adapter is therefore
the set of slots that differ from the base's. Switching adapters puts other objects into the slots, without copies.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# (module, name of the module's dict, key in it): the object
Slots = dict[tuple[nn.Module, str, str], Any]
# plain attributes of a network that change with its adaptation
ATTRIBUTES = ("num_classes", "config", "adaptation", "recompute_context")


def slots(network: nn.Module) -> Slots:
    """All modules, parameters and `ATTRIBUTES` of the network as it is now."""
    found = {(network, "__dict__", name): network.__dict__.get(name) for name in ATTRIBUTES}
    for module in network.modules():
        for kind in ("_modules", "_parameters"):
            found |= {(module, kind, name): value for name, value in getattr(module, kind).items()}
    return found


def difference(network: nn.Module, before: Slots) -> Slots:
    """The slots of the network that differ from `before`, without the contents of new modules."""
    modules = {module for module, _, _ in before}
    return {
        slot: value
        for slot, value in slots(network).items()
        if slot[0] in modules and (slot not in before or before[slot] is not value)
    }


def fill(content: Slots) -> None:
    """Put every object into its slot."""
    for (module, kind, name), value in content.items():
        getattr(module, kind)[name] = value


def undo(change: Slots, before: Slots) -> None:
    """Restore the slots of `change` to their content `before`."""
    for module, kind, name in change:
        if (module, kind, name) in before:
            getattr(module, kind)[name] = before[module, kind, name]
        else:
            del getattr(module, kind)[name]


def separate(before: Slots) -> None:
    """Replace the parameters of `before` that train by copies, so that the originals keep their values."""
    for (module, kind, name), value in before.items():
        if kind == "_parameters" and value is not None and value.requires_grad and module._parameters[name] is value:
            module._parameters[name] = nn.Parameter(value.detach().clone())
            value.requires_grad_(False)


@contextmanager
def all_or_nothing(network: nn.Module) -> Iterator[None]:
    """Undo every change of the network's structure in the block if it raises an error."""
    before, trained = slots(network), {p: p.requires_grad for p in network.parameters()}
    try:
        yield
    except BaseException:
        undo(difference(network, before), before)
        for parameter, flag in trained.items():
            parameter.requires_grad_(flag)
        raise

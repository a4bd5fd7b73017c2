"""The label table of a network that is adapted to other classes."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ditune.errors import UserError
from ditune.peft.base import LABELS

WAYS = ("reinit", "reuse", "mean", "map")


@torch.no_grad()
def adapt_labels(network: nn.Module, way: str, new: int | Sequence[str], old: Sequence[str] | None = None) -> None:
    """Give a network a label table for other classes; the last row, of the null class, is kept.

    Args:
        network: not adapted yet. Its label table, `num_classes` and `config` are changed in place.
        way: 'reinit' = N(0, 0.02^2) as in a new network; 'reuse' = the first rows of the old table; 'mean' = the mean
            of the old classes in every row; 'map' = the rows of the old classes of the same name, the mean for others.
        new: number of the new classes, or their names (required by 'map').
        old: names of the network's classes; only 'map' needs them.

    Raises:
        UserError: an unknown way, or classes that it cannot use.
    """
    if way not in WAYS:
        raise UserError(f"classes is {way!r}. Choose one of {', '.join(WAYS)}.")
    count = new if isinstance(new, int) else len(new)
    table = getattr(network, LABELS).embedding_table.weight
    classes, null = table[: network.num_classes], table[network.num_classes :]  # (K, D), (1 or 0, D)
    if way == "reinit":
        rows = nn.init.normal_(classes.new_empty(count, table.shape[1]), std=0.02)
    elif way == "mean":
        rows = classes.mean(dim=0).repeat(count, 1)
    elif way == "reuse":
        if count > len(classes):
            raise UserError(
                f"classes=reuse needs a base of at least {count} classes, it has {len(classes)}. "
                "Set classes=mean, reinit or map."
            )
        rows = classes[:count]
    else:
        rows = _mapped(classes, new, old)
    replace_table(network, count, torch.cat([rows, null]))


def _mapped(classes: Tensor, new: int | Sequence[str], old: Sequence[str] | None) -> Tensor:
    if old is None or isinstance(new, int):
        raise UserError("classes=map needs the names of the base's classes. Set classes=reuse, mean or reinit.")
    if not set(old) & set(new):
        raise UserError("classes=map found no class name that the base knows. Set classes=mean or reinit.")
    known = {name: i for i, name in enumerate(old)}
    mean = classes.mean(dim=0)
    return torch.stack([classes[known[name]] if name in known else mean for name in new])


def replace_table(network: nn.Module, num_classes: int, table: Tensor) -> None:
    """Replace the label table in place, with `num_classes` and `config` of the network.

    Args:
        network: any network of this package.
        num_classes: K.
        table: (K, D), or (K + 1, D) with a null class.
    """
    embedder = getattr(network, LABELS)
    embedder.embedding_table = nn.Embedding.from_pretrained(table.clone(), freeze=False)
    network.num_classes = num_classes
    network.config = network.config | {"num_classes": num_classes}


def resize_labels(network: nn.Module, num_classes: int) -> None:
    """Replace the label table in place by zeros for `num_classes` classes, to be loaded from an adapter."""
    table = getattr(network, LABELS).embedding_table.weight
    null = len(table) - network.num_classes
    replace_table(network, num_classes, table.new_zeros(num_classes + null, table.shape[1]))

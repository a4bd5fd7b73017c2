"""A server's part of federated averaging with zeros (FedSparsify, Stripelis et al. 2022, arXiv 2204.12430).

A round has four parts: each client trains on its own images from the weights of all, under their masks; the smallest
weights are purged, by each client before the merge (local) or by the server after it (global); the clients' weights are
merged; and the next round tunes what stayed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ditune.training.masks import masks
from ditune.training.sparsity import Amount, Sparsity

MERGES = ("fedavg", "nnz", "majority")
PURGES = ("global", "local")

Named = dict[str, Tensor]


@dataclass
class Weights:
    """What trains, after a round.

    Args:
        values: by name, without zeros of `masks`.
        average: their EMA, likewise.
        masks: bool by name of what is masked; True = the weight stays.
    """

    values: Named
    average: Named
    masks: Named = field(default_factory=dict)


def fedavg(values: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """sum_k n_k w_k / sum_k n_k.

    Args:
        values: w_k of the clients, of one shape.
        factors: n_k, the numbers of their images.
    """
    total = sum(value.double() * factor for value, factor in zip(values, factors, strict=True))
    return (total / sum(factors)).to(values[0].dtype)


def nnz(values: Sequence[Tensor], kept: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """FedAvg of each weight over the clients that have kept it; 0 where none has.

    Args:
        values, factors: see `fedavg`.
        kept: masks of the clients.
    """
    weights = [mask.double() * factor for mask, factor in zip(kept, factors, strict=True)]
    total = sum(value.double() * weight for value, weight in zip(values, weights, strict=True))
    count = torch.stack(weights).sum(dim=0)
    return torch.where(count > 0, total / count.clamp(min=torch.finfo(count.dtype).tiny), 0).to(values[0].dtype)


def voted(kept: Sequence[Tensor], needed: int | None = None) -> Tensor:
    """The weights that enough clients have kept.

    Args:
        kept: masks of K clients.
        needed: votes; None = more than K / 2. The authors' code takes floor(K / 2), which is a single vote of three.
    """
    needed = len(kept) // 2 + 1 if needed is None else needed
    return torch.stack(list(kept)).sum(dim=0) >= needed


def merge(clients: Sequence[Weights], factors: Sequence[float], how: str = "fedavg") -> Weights:
    """The weights of all.

    Args:
        clients: their weights, each under its own masks.
        factors: numbers of their images.
        how: 'fedavg'; 'nnz', see `nnz`; 'majority': FedAvg with zeros counted, of the weights that `voted` has kept.
    """
    first = clients[0]
    merged = Weights({}, {})
    for name in first.masks:
        kept = [client.masks[name] for client in clients]
        merged.masks[name] = voted(kept) if how == "majority" else torch.stack(kept).any(dim=0)
    for part in ("values", "average"):
        for name in getattr(first, part):
            each = [getattr(client, part)[name] for client in clients]
            if name in first.masks and how == "nnz":
                value = nnz(each, [client.masks[name] for client in clients], factors)
            else:
                value = fedavg(each, factors)
            getattr(merged, part)[name] = value * merged.masks[name] if name in merged.masks else value
    return merged


def purge(weights: Weights, sparsity: Sparsity, amount: Amount | None) -> Weights:
    """Set the smallest weights to zero; what is zero already stays so.

    Args:
        weights: of a client or of all.
        sparsity: says which are masked, and by which rule.
        amount: pattern or share of the zeros; None = none yet.
    """
    if amount is None:
        return weights
    found = masks(sparsity.targets(weights.values), amount, sparsity.scope)
    found = {name: mask & weights.masks.get(name, torch.ones_like(mask)) for name, mask in found.items()}

    def masked(values: Mapping[str, Tensor]) -> Named:
        return {name: value * found[name] if name in found else value for name, value in values.items()}

    return Weights(masked(weights.values), masked(weights.average), found)


def next_weights(
    clients: Sequence[Weights],
    factors: Sequence[float],
    how: str,
    where: str,
    sparsity: Sparsity | None,
    step: int,
) -> Weights:
    """Purge and merge, in the order of `where`.

    Args:
        clients, factors, how: see `merge`.
        where: 'global' or 'local', see `PURGES`.
        sparsity: with the schedule of the zeros; None = there are none.
        step: optimizer steps that each client has done.
    """
    amount = None if sparsity is None else sparsity.amount(step)
    if where == "local" and amount is not None:
        return merge([purge(client, sparsity, amount) for client in clients], factors, how)
    merged = merge(clients, factors, how)
    return merged if amount is None else purge(merged, sparsity, amount)

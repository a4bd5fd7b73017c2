"""Which weights stay: masks by magnitude, n of m along the input, or the largest of all.

The rules are those of SparseDM (arXiv 2404.10445) and FedSparsify (arXiv 2204.12430), each with one order for ties.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ditune.errors import UserError, require

UNSTRUCTURED = "unstructured"
SCOPES = ("global", "layer")
# the matrices of attention and MLP of every block: of DiT's four, the routed experts and the shared ones
TARGET = (
    r"blocks\.\d+\.(attn\.(qkv|proj)\.weight|mlp\.fc[12]\.weight|moe\.experts\.w_\w+|moe\.shared_experts\.\w+\.weight)"
)


def parsed(pattern: str, key: str = "sparsity.pattern") -> tuple[int, int] | None:
    """n and m of a pattern n:m; None = unstructured.

    Raises:
        UserError: it is neither.
    """
    if pattern == UNSTRUCTURED:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", str(pattern))
    valid = found is not None and 1 <= int(found[1]) <= int(found[2])
    require(valid, key, pattern, f"Set n:m with 1 <= n <= m, such as '2:4', or {UNSTRUCTURED}.")
    return int(found[1]), int(found[2])


def chosen(parameters: Mapping[str, Tensor], target: str | None, groups: int | None) -> dict[str, Tensor]:
    """The parameters whose whole name matches, in their order.

    Args:
        parameters: by name.
        target: regular expression; None = `TARGET`.
        groups: m of n:m, by which the input width must be divisible; None = any shape.

    Raises:
        UserError: none matches, or a shape has no groups of m.
    """
    try:
        wanted = re.compile(target or TARGET)
    except re.error as error:
        raise UserError(f"sparsity.target is no regular expression ({error}). Mend it, or leave it null.") from error
    found = {name: p for name, p in parameters.items() if wanted.fullmatch(name)}
    if not found:
        raise UserError(
            f"sparsity.target matches none of the parameters that train, such as {next(iter(parameters), 'none')}. "
            "Set it to a regular expression of their names, or prune the base into a file by src/prune.py."
        )
    for name, p in found.items():
        if groups is not None and (p.ndim not in (2, 3) or p.shape[input_dim(p)] % groups):
            raise UserError(
                f"{name} has the shape {tuple(p.shape)}, whose inputs are not divided into groups of {groups}. Leave "
                "it out by sparsity.target, or set another sparsity.pattern."
            )
    return found


def input_dim(weight: Tensor) -> int:
    """Dimension of the inputs: the last of a linear layer (out, in), the second of stacked experts (E, in, out)."""
    return 1 if weight.ndim == 3 else weight.ndim - 1


def n_of_m(weight: Tensor, n: int, m: int) -> Tensor:
    """Keep the n largest of every m inputs that follow each other; of equal ones, the later ones.

    Args:
        weight: matrix or stacked matrices, see `input_dim`.
        n, m: of the pattern.

    Returns:
        bool, in the shape of `weight`.
    """
    dim = input_dim(weight)
    groups = weight.detach().float().abs().transpose(dim, -1).unflatten(-1, (-1, m))  # (..., in / m, m)
    smallest = groups.argsort(dim=-1, stable=True)[..., : m - n]
    return torch.ones_like(groups, dtype=torch.bool).scatter(-1, smallest, False).flatten(-2).transpose(dim, -1)


def largest(weights: Mapping[str, Tensor], share: float, scope: str = "global") -> dict[str, Tensor]:
    """Keep what is at least as large as the threshold, which is the int(s n)-th smallest of n weights, from 0.

    Args:
        weights: by name.
        share: s, share of the weights that go, in [0, 1).
        scope: 'global': one threshold for all, 'layer': one for each.

    Returns:
        bool, by name.
    """
    if scope == "layer" and len(weights) > 1:
        return {name: largest({name: w}, share)[name] for name, w in weights.items()}
    sizes = torch.cat([w.detach().float().abs().flatten() for w in weights.values()])
    threshold = sizes.kthvalue(int(share * len(sizes)) + 1).values
    return {name: w.detach().float().abs() >= threshold for name, w in weights.items()}


def masks(weights: Mapping[str, Tensor], amount: tuple[int, int] | float, scope: str) -> dict[str, Tensor]:
    """The masks of all weights: bool by name, True = the weight stays.

    Args:
        weights: by name.
        amount: n and m, or the share that goes.
        scope: of a share, see `largest`.
    """
    if isinstance(amount, tuple):
        return {name: n_of_m(w, *amount) for name, w in weights.items()}
    return largest(weights, amount, scope)


def zeros(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of zeros by name."""
    return {name: int((w == 0).sum()) for name, w in weights.items()}

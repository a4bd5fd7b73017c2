"""Networks by preset name, and classes by the name in a file's header."""

from typing import Any

from ditune.networks.dit import DiT
from ditune.networks.dit_moe import DiTMoE
from ditune.networks.sizes import DENSE_NETWORKS, MOE_NETWORKS

CLASSES: dict[str, type[DiT]] = {cls.kind: cls for cls in (DiT, DiTMoE)}
NETWORKS = (*DENSE_NETWORKS, *MOE_NETWORKS)


def build_network(name: str, **kwargs: Any) -> DiT:
    """A new network of a preset size.

    Args:
        name: one of `NETWORKS`.
        **kwargs: further arguments of its constructor, which override the preset's.

    Raises:
        ValueError: there is no network of that name.
    """
    if name in MOE_NETWORKS:
        return DiTMoE(**(MOE_NETWORKS[name] | kwargs))
    if name not in DENSE_NETWORKS:
        raise ValueError(f"there is no network {name!r}; there are {', '.join(NETWORKS)}")
    return DiT(**(DENSE_NETWORKS[name] | kwargs))

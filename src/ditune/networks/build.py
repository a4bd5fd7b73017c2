"""Networks by name, and by the class that a file names."""

from typing import Any

from ditune.networks.dit import NETWORKS as DENSE
from ditune.networks.dit import DiT
from ditune.networks.dit_moe import MOE_NETWORKS, DiTMoE

CLASSES: dict[str, type[DiT]] = {cls.kind: cls for cls in (DiT, DiTMoE)}
NETWORKS = (*DENSE, *MOE_NETWORKS)


def build_network(name: str, **kwargs: Any) -> DiT:
    """The network called `name` (one of `NETWORKS`); `kwargs` go to its constructor.

    Raises:
        ValueError: when there is no network of that name.
    """
    if name in MOE_NETWORKS:
        return DiTMoE(**(MOE_NETWORKS[name] | kwargs))
    if name not in DENSE:
        raise ValueError(f"there is no network {name!r}; there are {', '.join(NETWORKS)}")
    hidden_size, depth, num_heads, patch_size = DENSE[name]
    sizes = {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "patch_size": patch_size}
    return DiT(**(sizes | kwargs))

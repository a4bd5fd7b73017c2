"""Networks: pure modules that import nothing else of the package."""

from ditune.networks.build import CLASSES, NETWORKS, build_network
from ditune.networks.dit import DiT
from ditune.networks.dit_moe import DiTMoE, activated

__all__ = ["CLASSES", "NETWORKS", "DiT", "DiTMoE", "activated", "build_network"]

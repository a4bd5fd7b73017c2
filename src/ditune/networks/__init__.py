"""What is computed: pure modules that import nothing of the rest."""

from .build import CLASSES, NETWORKS, build_network
from .dit import DiT
from .dit_moe import DiTMoE, activated

__all__ = ["CLASSES", "NETWORKS", "DiT", "DiTMoE", "activated", "build_network"]

"""What is computed: pure modules that import nothing of the rest."""

from .dit import NETWORKS, DiT, build_network

__all__ = ["NETWORKS", "DiT", "build_network"]

"""DiTune: fine-tune diffusion transformers with few parameters."""

__version__ = "0.1.0"

"""Hydra finds its sweepers in this namespace; this one searches the ranks of LoRA."""

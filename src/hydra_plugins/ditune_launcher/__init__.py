"""Hydra finds its launchers in this namespace; this one runs every job of a sweep as a process tree of its own."""

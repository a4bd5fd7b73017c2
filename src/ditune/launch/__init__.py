"""Sweeps over the devices of a machine: which jobs there are, where each runs, and one process tree for each."""

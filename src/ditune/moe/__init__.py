"""Mixtures of experts apart from the network: load balance, routing statistics, plots, upcycling."""

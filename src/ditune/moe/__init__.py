"""All about experts that is not a network: balance of their load, statistics, plots, upcycling."""

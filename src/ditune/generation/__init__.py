"""Images from a trained network, by their numbers, and grids of them to look at."""

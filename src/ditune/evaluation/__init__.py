"""What a network or a set of images is worth, by a fixed protocol."""

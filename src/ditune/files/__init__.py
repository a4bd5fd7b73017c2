"""The ground floor: writing files whole, hashes, locks, downloads. It imports nothing of the package but errors."""

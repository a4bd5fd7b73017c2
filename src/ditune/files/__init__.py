"""The ground floor: atomic writing, hashes, locks, downloads. It imports only errors and progress of the package."""

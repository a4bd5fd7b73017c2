"""Networks and adapters as files. No pickle is executed."""

from ditune.checkpoints.adapters import check_file, load_adapter, load_adapters, read_adapter, save_adapter
from ditune.checkpoints.networks import (
    NetworkFile,
    foreign_process,
    is_ours,
    load_network,
    network_like,
    read_header,
    read_network,
    save_network,
)
from ditune.checkpoints.published import locate, locate_adapter
from ditune.files.atomic import atomic, read_json, sha256, write_json

__all__ = [
    "NetworkFile",
    "atomic",
    "check_file",
    "foreign_process",
    "is_ours",
    "load_adapter",
    "load_adapters",
    "load_network",
    "locate",
    "locate_adapter",
    "network_like",
    "read_adapter",
    "read_header",
    "read_json",
    "read_network",
    "save_adapter",
    "save_network",
    "sha256",
    "write_json",
]

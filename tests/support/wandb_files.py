"""Offline files of W&B, read back."""

import json
import struct
import time
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record


def records(path: Path) -> list[Record]:
    """Records of an offline W&B file: LevelDB's log format behind a header of seven bytes.

    32-KiB blocks of frames [crc32c u32, length u16, type u8]; types: 1 whole, 2 first, 3 middle, 4 last part.
    """
    content, at, found, payload = path.read_bytes(), 7, [], b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:  # too little for a frame: the block is padded
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        payload += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(payload))
            payload = b""
    return found


def key(item) -> str:
    return item.key or "/".join(item.nested_key)


def wandb_records(folder: Path) -> tuple[dict[str, list], list[Path]]:
    """Records by kind of all W&B files of a run folder, oldest first, and the files; W&B writes them a little later."""
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.parent.name)
    kinds: dict[str, list] = {}
    for file in files:
        end = time.monotonic() + 30
        while "exit" not in [r.WhichOneof("record_type") for r in records(file)] and time.monotonic() < end:
            time.sleep(0.1)
        for record in records(file):
            kinds.setdefault(record.WhichOneof("record_type"), []).append(record)
    return kinds, files


def values(items) -> dict:
    return {key(item): json.loads(item.value_json) for item in items}


def summary_of(written: dict[str, list]) -> dict:
    """The run's summary as W&B shows it: the last value of each key, under its full name."""
    return {k: v for r in written["summary"] for k, v in values(r.summary.update).items()}

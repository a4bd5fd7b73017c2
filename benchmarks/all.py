"""All benchmarks of speed on one device, in less than eight minutes on an idle machine.

    python benchmarks/all.py [--device cuda] [--out docs/results/speed]

Each prints its table; with --out it writes <folder>/<benchmark>_<device>.json, and `python benchmarks/tables.py` puts
those into docs/results/speed.md. benchmarks/caching.py takes a quarter of an hour on a CPU and is run by itself.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
LISTS = {
    "cpu": [
        ["train_step.py", "--seconds", "60"],
        ["sampling.py", "--seconds", "30"],
        ["moe_layer.py", "--rounds", "3", "--tokens", "2048"],
        ["data_loading.py", "--seconds", "20"],
        ["growth.py", "--seconds", "30"],
        ["moe_network.py", "--seconds", "20", "--depth", "2"],
        ["step_profile.py", "--rounds", "1"],
        ["trainer_overhead.py", "--seconds", "40", "--steps", "100"],
    ],
    "cuda": [
        ["train_step.py", "--seconds", "60"],
        ["train_step.py", "--seconds", "45", "--pixels", "512", "--batch", "8"],
        ["sampling.py", "--seconds", "45"],
        ["moe_layer.py", "--rounds", "5"],
        ["growth.py", "--seconds", "20", "--processes", "1"],
        ["moe_network.py", "--seconds", "20"],
        ["step_profile.py", "--network", "dit_xl_2"],
    ],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks one after the other, each in a process of its own for its memory; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=tuple(LISTS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="folder for the JSON files")
    given = parser.parse_args(arguments)
    failed, start = [], time.monotonic()
    for script, *options in LISTS[given.device]:
        options += ["--device", given.device] + (["--out", given.out] if given.out else [])
        if subprocess.run([sys.executable, str(HERE / script), *options], check=False).returncode:
            failed.append(script)
        sys.stderr.write(f"{script}: {time.monotonic() - start:.0f} s since the start\n")
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}\n")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

"""Run in the copy of the repository that test_extending.py has extended: uses everything that the page adds.

    python tests/support/extended.py <folder>

Writes one JSON object of what came out.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

import miniatures
from ditune.checkpoints import load_network
from ditune.commands.train import train
from ditune.networks import NETWORKS
from helpers import SMALL_FLOW, assert_same_bits, compose

OURS = [override for override in SMALL_FLOW if not override.startswith(("data=", "objective=", "metrics."))]


def run(folder: Path, *overrides: str) -> dict:
    """result.json of a small training."""
    shared = [*OURS, "data=shapes", f"data.root={folder.parent}/data", "data.latents=false", "data.num_workers=0"]
    shared += ["objective=late_flow", "sampler=ralston", "max_steps=1"]
    assert train(compose(folder, *shared, *overrides)) == 0
    return json.loads((folder / "result.json").read_text())


def slashed(path: Path, folder: Path) -> int:
    """Write a network in the new format, read it again; number of its tensors."""
    network = load_network(path)
    tensors = {key.replace(".", "/"): value.contiguous() for key, value in network.state_dict().items()}
    save_file(tensors, folder / "slashed.safetensors")
    again = load_network(folder / "slashed.safetensors", num_heads=network.config["num_heads"])
    assert_same_bits(dict(again.state_dict()), dict(network.state_dict()))
    return len(tensors)


def main(folder: Path) -> None:
    miniatures.shapes(folder / "data")
    base = folder / "base" / "network.safetensors"
    found = {"base": run(base.parent, "peft=full", "metrics.n=4")}
    for method in ("attention", "delora"):
        found[method] = run(folder / method, f"peft={method}", f"pretrained={base}", "metrics.n=0")
    found["tensors"] = slashed(base, folder)
    found["networks"] = list(NETWORKS)
    sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

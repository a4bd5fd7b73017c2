"""What trainings leave behind, written by hand: reports are tested without training anything."""

import json
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

METHODS = {"DiffFit": (40, 0.30), "BitFit": (30, 0.35), "Full": (4000, 0.20)}  # trained parameters, KID of seed 0


def write_run(
    folder: Path,
    method: str,
    seed: int,
    data: str = "a",
    status: str = "finished",
    changed: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """A run folder.

    Args:
        folder: of the run.
        method: one of METHODS.
        seed: of the run; each adds 0.01 to its KID.
        data: name of the dataset.
        status: in result.json; only a finished run has metrics and samples.
        changed: other keys of result.json.
        config: other keys of config.yaml.
    """
    parameters, kid = METHODS[method]
    result = {
        "status": status,
        "method": method,
        "peft": {"name": method.lower()},
        "parameters": {"trainable": parameters, "total": 4000, "share": parameters / 4000},
        "batch_size": 4,
        "max_steps": 10,
        "lr": 1e-3,
        "seed": seed,
        "data": {"name": data},
    }
    if status == "finished":
        after = {"kid_x": kid + 0.01 * seed, "kid_x_std": 0.001, "precision_x": 1 - kid, "n": 8}
        result |= {
            "seconds": {"fit": 5.0},
            "images_per_second": 8.0,
            "denoising": {"before": 1.0, "after": 0.5},
            "metrics": {"protocol": {"n": 8}, "before": {"kid_x": 0.5}, "after": after},
        }
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 * 10 + 2, 8 * 10 + 2), (parameters % 256, 0, 0)).save(folder / "samples" / "grid.png")
        lines = ["step,train/loss,other", *(f"{step},{2 - step / 10},1" for step in range(10)), "10,,2"]
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result | (changed or {})))
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": seed, "sampler": {"steps": 25}} | (config or {})))


def metrics(value: float, name: str = "kid_x", **protocol: object) -> dict[str, Any]:
    """Keys of result.json that give a run this value of a metric."""
    return {"metrics": {"protocol": {"n": 8} | protocol, "after": {name: value, "n": 8}}}

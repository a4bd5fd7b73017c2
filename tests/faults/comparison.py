"""The one comparison of a run that a fault has struck with one that nothing has struck."""

import csv
from pathlib import Path
from typing import Any

import torch

from helpers import assert_same_bits

PARTS = ("state_dict", "ema", "teacher", "method", "balance", "optimizer_states", "lr_schedulers", "identity")


def logged(folder: Path) -> list[dict[str, str]]:
    """The lines of metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def saved(folder: Path, step: int) -> dict[str, Any]:
    """The checkpoint of a step."""
    return torch.load(folder / "checkpoints" / f"step_{step:08d}.ckpt", weights_only=True)


def assert_same_end(struck: Path, whole: Path, steps: int, log: bool = True) -> None:
    """Weights, average, optimizer, file, last sample grid and log are the same to the bit.

    Args:
        struck, whole: run folders.
        steps: of both.
        log: whether metrics.csv is compared too.
    """
    a, b = saved(struck, steps), saved(whole, steps)
    assert a["global_step"] == b["global_step"] == steps
    for part in PARTS:
        assert_same_bits(a[part], b[part], part)
    for name in ("network.safetensors", "adapter/adapter_model.safetensors"):
        assert (struck / name).exists() == (whole / name).exists()
        if (whole / name).exists():
            assert (struck / name).read_bytes() == (whole / name).read_bytes()
    sheet = f"samples/step_{steps:07d}.png"
    assert (struck / sheet).read_bytes() == (whole / sheet).read_bytes()
    if log:
        assert logged(struck) == logged(whole)
        assert [row["step"] for row in logged(whole)] == [str(step) for step in range(steps)]

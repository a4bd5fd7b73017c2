"""Run by test_memory.py: trainings and images in a process that may not have more memory than it needs to begin.

    python tests/support/limited.py <folder> <pictures>

Writes one JSON object of what came out.
"""

import json
import resource
import sys
from pathlib import Path

import psutil
import torch

from ditune.cli import reported
from ditune.commands.sample import sample
from ditune.commands.train import train
from ditune.errors import UserError
from ditune.memory import memory_for
from ditune.training.micro_batch import largest_micro_batch
from helpers import SMALL, compose, task

ROOM = 400 * 2**20  # bytes beyond what the process has when its work begins
BATCH = 2048  # its activations need about twice the room


def limit(room: int) -> None:
    """Let the system refuse what goes beyond."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + room, hard))


def run(folder: Path, pictures: str, *overrides: str) -> int:
    """Exit code of a training."""
    common = [*SMALL, f"data.root={pictures}", "peft=full", "max_steps=1", f"batch_size={BATCH}"]
    cfg = compose(folder, *common, *overrides)
    try:
        reported(lambda: train(cfg), traceback=False)
    except SystemExit as end:
        return end.code
    return 0


def try_tensor(count: int) -> None:
    """What a micro-batch of `count` images may take: 64 MiB each."""
    torch.empty(count * 2**26, dtype=torch.uint8).fill_(0)


def sampled(folder: Path) -> str:
    """The sentence of an image generation whose batch is too large."""
    command = task("sample", f"run={folder}", "n=8192", "+sampler.batch_size=8192", f"out={folder}/out")
    try:
        sample(command)
    except UserError as error:
        return str(error)
    return "it fitted"


def main(folder: Path, pictures: str) -> None:
    run(folder / "warm", pictures, "batch_size=4")  # all that is imported late is there now
    limit(ROOM)
    found = {"micro_batch": largest_micro_batch(try_tensor, [64, 32, 16, 8, 4, 2, 1])}
    with_code = run(folder / "whole", pictures)
    found["whole"] = {"code": with_code} | json.loads((folder / "whole" / "result.json").read_text())
    found["auto"] = {"code": run(folder / "auto", pictures, "trainer.accumulate_grad_batches=auto")}
    found["auto"] |= json.loads((folder / "auto" / "result.json").read_text())
    found["sampled"] = sampled(folder / "warm")
    try:
        with memory_for("a tensor", "Take a smaller one."):
            bytearray(ROOM)
    except UserError as error:
        found["python"] = str(error)
    sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

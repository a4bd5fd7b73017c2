"""Losses of several runs on the same held-out images with the same noise, compared image by image.

    python benchmarks/held_out.py full=<run>,<run> lora=<run>,<run> halves=<run>+<run>,<run>+<run> [--out x.json]

A row has a name and one run for each seed. A run is a run folder or a network file. Runs joined by + are experts by
time, each in the part of its `objective.interval`. The first row is what the others are compared with. Times and noise
are those of `metrics.seed` of the first run, so rows differ by the weights alone. The error of a difference is that of
its mean over the images, seeds averaged.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import device_facts
from torch import Tensor

from ditune.checkpoints import load_network
from ditune.commands.prepare import held_out_images, held_out_source
from ditune.config.instantiate import instantiate
from ditune.evaluation.denoising_loss import REPEATS, image_losses, images_at_once
from ditune.evaluation.held_out import HeldOut
from ditune.objectives import Objective
from ditune.run import Run, load_run

QUARTERS = 4  # of the process, from data to noise


@dataclass
class Task:
    """What all rows are measured on.

    Args:
        objective: of the first run, on the whole process.
        source: the images.
        seed: of times and noise.
        count: of the images, evenly spaced.
    """

    objective: Objective
    source: HeldOut
    seed: int
    count: int

    def losses(self, network: torch.nn.Module) -> tuple[Tensor, Tensor]:  # (REPEATS, N) each
        """Losses, and their parts of the process in [0, 1]."""
        if self.count > images_at_once(network):
            raise SystemExit(f"{self.count} images are more than one batch of this network. Give a smaller --n.")
        times: list[Tensor] = []
        hook = network.register_forward_pre_hook(lambda module, inputs: times.append(inputs[1].detach().clone()))
        found = image_losses(network, self.objective, self.source, self.seed, bf16=False, limit=self.count)
        hook.remove()
        if len(times) != REPEATS:
            raise SystemExit(f"{type(self.objective).__name__} calls the network more than once for a loss")
        return found, self.objective.process.part(torch.stack(times))


def task_of(run: Run, split: str, n: int) -> Task:
    """The objective of a run, and at most n images of a split of its data."""
    run.cfg.metrics.loss_split = split
    objective = instantiate(run.cfg.objective, "objective")
    objective.process = run.generator.process
    source = held_out_source(run.cfg, held_out_images(run.cfg), run.generator.autoencoder)
    return Task(objective, source, run.cfg.metrics.seed, min(n, len(source)))


def measured(task: Task, text: str, first: Run) -> tuple[Tensor, Tensor]:
    """Losses and parts of a run, a network file, or of runs joined by +."""
    if text.endswith(".safetensors"):
        network = load_network(Path(text), first.network.config, **task.objective.process.network)
        return task.losses(network.eval())
    runs = [load_run(folder) for folder in text.split("+")]
    each = [(run, *task.losses(run.network)) for run in runs]
    _, loss, part = each[0]
    for run, other, _ in each[1:]:
        low, high = run.cfg.objective.interval
        inside = (part >= low) & ((part < high) | (high == 1))
        loss = torch.where(inside, other, loss)
    return loss, part


def row_of(name: str, losses: list[Tensor], parts: Tensor, first: list[Tensor]) -> dict:
    """A row of the table: losses by seed and quarter, and the difference from the first row."""
    images = torch.stack(losses).mean(dim=(0, 1))  # (N,)
    difference = images - torch.stack(first).mean(dim=(0, 1))
    quarter = (parts * QUARTERS).long().clamp(max=QUARTERS - 1)
    mean = torch.stack(losses).mean(dim=0)
    return {
        "name": name,
        "loss": [loss.mean().item() for loss in losses],
        "mean": images.mean().item(),
        "difference": difference.mean().item(),
        "error": difference.std().item() / len(difference) ** 0.5,
        "quarters": [mean[quarter == k].mean().item() for k in range(QUARTERS)],
    }


def table(rows: Sequence[dict]) -> str:
    """The rows in Markdown."""
    lines = ["| | loss, by seed | mean | difference | by quarter, from data to noise |", "|---|---|---|---|---|"]
    for row in rows:
        by_seed, quarters = (", ".join(f"{v:.4f}" for v in row[key]) for key in ("loss", "quarters"))
        difference = f"{row['difference']:+.4f} ± {row['error']:.4f}" if row is not rows[0] else ""
        lines.append(f"| {row['name']} | {by_seed} | {row['mean']:.4f} | {difference} | {quarters} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[dict]:
    """Measure, print, and write; returns the rows."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("rows", nargs="+", metavar="NAME=RUN[,RUN...]")
    options.add_argument("--split", default="test", help="of the data of the first run")
    options.add_argument("--n", type=int, default=1000, help="images at most")
    options.add_argument("--out", type=Path, help="file for the rows, .json")
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    named = {name: runs.split(",") for name, _, runs in (text.partition("=") for text in given.rows)}
    folders = [part for runs in named.values() for run in runs for part in run.split("+")]
    first_run = load_run(next(folder for folder in folders if not folder.endswith(".safetensors")))
    task = task_of(first_run, given.split, given.n)
    rows, first = [], None
    for name, runs in named.items():
        each = [measured(task, run, first_run) for run in runs]
        losses, parts = [loss for loss, _ in each], each[0][1]
        first = first or losses
        rows.append(row_of(name, losses, parts, first))
        sys.stderr.write(f"{name}: {statistics.fmean(rows[-1]['loss']):.4f}\n")
    print(table(rows))  # noqa: T201
    if given.out is not None:
        content = {"images": task.count, "repeats": REPEATS, "device": device_facts("cpu"), "rows": rows}
        given.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()

"""Loss of a run, and KID of networks saved on the way, as one picture.

    python benchmarks/training_curves.py <run>/metrics.csv curves.png [1000=logs/evaluate/a/result.json ...]

Each <step>=<result.json> is what `python src/evaluate.py checkpoint=...` wrote.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

WINDOW = 25  # logged lines in the running mean


def draw_kid(axes: plt.Axes, evaluated: tuple[str, ...]) -> None:
    known = sorted(
        (int(step), json.loads(Path(path).read_text())) for step, _, path in (e.partition("=") for e in evaluated)
    )
    axes.plot([step for step, _ in known], [r["metrics"]["values"]["kid_efflite0"] for _, r in known], marker="o")
    axes.set(xlabel="step", ylabel="kid_efflite0", title="against the train split", ylim=(0, None))


def main(metrics: str, out: str, *evaluated: str) -> None:
    with Path(metrics).open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(1, 1 + bool(evaluated), figsize=(6 + 5 * bool(evaluated), 4), squeeze=False)
    left = axes[0, 0]
    for name, label in [("train/loss", "all"), *((f"train/loss_quarter_{k}", f"quarter {k + 1}") for k in range(4))]:
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        steps, losses = zip(*[(s, v) for s, v in points if v == v], strict=True)
        means = [
            sum(losses[max(0, i - WINDOW) : i + 1]) / len(losses[max(0, i - WINDOW) : i + 1])
            for i in range(len(losses))
        ]
        left.plot(steps, means, label=label, linewidth=2 if label == "all" else 1)
    left.set(xlabel="step", ylabel="loss (running mean)", title="by quarters of the process, 1 = next to the data")
    left.legend()
    if evaluated:
        draw_kid(axes[0, 1], evaluated)
    figure.tight_layout()
    figure.savefig(out, dpi=90)


if __name__ == "__main__":
    main(*sys.argv[1:])

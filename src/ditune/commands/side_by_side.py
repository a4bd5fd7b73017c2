"""What the app shows: images of several networks from the same noise, and the runs of a sweep as rows."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from PIL import Image

from ditune.checkpoints import locate
from ditune.config import hardware
from ditune.distributed import best_device
from ditune.errors import UserError
from ditune.generation.grids import grid
from ditune.report.plots import pareto
from ditune.report.results import Run, find_results, main_metric
from ditune.run import Run as TrainedRun
from ditune.run import Trained, load_checkpoint, load_run

BASE = "base network"
KEPT = 4  # networks in memory
SMALLEST = 2  # images of a row
COLUMNS = ("run", "method", "seed", "trained", "metric", "loss on held-out images")


class Shelf:
    """The networks that can be chosen: the base, and the finished runs below a folder, newest first.

    Args:
        cfg: of src/app.py.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg, self.folder = cfg, Path(cfg.runs).expanduser()
        self.load = lru_cache(KEPT)(self._load)

    def names(self) -> list[str]:
        """Names to choose from; the base network is the first."""
        runs = [path.parent for path in self.folder.glob("*/result.json")]
        runs = [run for run in runs if (run / "adapter").is_dir() or (run / "network.safetensors").is_file()]
        return [BASE, *(run.name for run in sorted(runs, key=lambda run: run.stat().st_mtime, reverse=True))]

    def _load(self, name: str) -> Trained:
        if name not in self.names():
            raise UserError(f"There is no run {name} in {self.folder}. Choose one of {', '.join(self.names())}.")
        if name != BASE:
            trained: Trained = load_run(self.folder / name, keep_base=(self.folder / name / "adapter").is_dir())
        else:
            cfg = self.cfg
            path = locate(cfg.checkpoint, Path(cfg.paths.cache_dir) / "networks")
            trained = load_checkpoint(path, cfg.autoencoder, cfg.sampler, True, cfg.process, cfg.network_overrides)
        device = best_device()
        bf16 = trained.generator.bf16 and hardware.multiplies_bf16(device.type)
        trained.network.to(device)
        return replace(trained, generator=replace(trained.generator, bf16=bf16))

    def classes(self, names: Sequence[str]) -> list[str]:
        """Classes that all of these networks know, in the order of the first."""
        known = [class_names(self.load(name)) for name in names]
        return [name for name in known[0] if all(name in others for others in known[1:])] if known else []

    def generate(
        self,
        names: Sequence[str],
        classes: Sequence[str],
        n: int,
        seed: int,
        steps: int,
        guidance: float,
        strength: float = 1.0,
    ) -> list[tuple[Image.Image, str]]:
        """One sheet for each network, of the same noise and the same classes.

        Args:
            names: networks to compare.
            classes: names of the classes; they repeat until there are n images. None = all that are common.
            n: images of each sheet.
            seed: of the noise.
            steps: network evaluations.
            guidance: scale of classifier-free guidance; 1 = none.
            strength: of each run's adapter, see `ditune.peft.dial`; 0 = its base, 1 = the adapter.

        Returns:
            (sheet, caption) of each network.

        Raises:
            UserError: nothing is chosen, a network does not know a class, or a run's adapter has no such strength.
        """
        if not names:
            raise UserError("No network is chosen. Choose the base network or a run.")
        common = self.classes(names)
        unknown = [name for name in classes if name not in common]
        if unknown or not common:
            raise UserError(f"Not all of these networks know {', '.join(unknown) or 'a common class'}. Choose others.")
        wanted = [(list(classes) or common)[i % len(classes or common)] for i in range(int(n))]
        sheets = []
        for name in names:
            trained = self.load(name)
            generator = replace(trained.generator, steps=int(steps), guidance=float(guidance))
            numbers = class_names(trained)
            labels = torch.tensor([numbers.index(label) for label in wanted])
            with at_strength(trained, float(strength)):
                images = generator.generate(trained.network, labels, int(seed))
            columns = max(SMALLEST, round(len(wanted) ** 0.5))
            sheets.append((grid(images, columns, labels=wanted), name))
        return sheets


def at_strength(trained: Trained, strength: float) -> AbstractContextManager[Any]:
    """Turn a run's adapter inside of the block; networks without one stay as they are.

    Raises:
        UserError: there is no such strength, or it leads to a base of other classes.
    """
    dial = getattr(getattr(trained.network, "adaptation", None), "dial", None)
    if dial is None or strength == 1:
        return nullcontext()
    if strength == 0 and isinstance(trained, TrainedRun) and trained.reshaped:
        raise UserError(
            f"Strength is 0, and {trained.folder.name} has other classes or another resolution than its base. Set it "
            "above 0."
        )
    return dial.turned(strength)


def class_names(trained: Trained) -> list[str]:
    """Names of the classes of a network; of files that name none, their numbers."""
    return trained.class_names or [str(k) for k in range(trained.network.num_classes)]


def sweeps(folder: Path | str) -> list[str]:
    """Names of the sweeps below a folder, newest first."""
    found = [path for path in Path(folder).expanduser().glob("*") if path.is_dir() and any(path.rglob("result.json"))]
    return [path.name for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]


def table(folder: Path) -> tuple[list[Run], str | None, list[list[Any]]]:
    """The finished runs of a sweep, the metric that stands first, and a row for each run, see `COLUMNS`."""
    runs = [run for run in find_results(folder) if run.finished]
    metric = main_metric(runs) if runs else None
    rows = []
    for run in runs:
        share = (run.result.get("parameters") or {}).get("share")
        loss = (run.result.get("denoising") or {}).get("after")
        value = run.values.get(metric) if metric else None
        cells = (None if number is None else float(f"{number:.4g}") for number in (value, loss))
        trained = "" if share is None else f"{share:.2%}"
        rows.append([run.folder.relative_to(folder).as_posix(), run.method, run.result.get("seed"), trained, *cells])
    return runs, metric, rows


def plot(runs: Sequence[Run], metric: str | None) -> Figure | None:
    """Metric over trained parameters; None without a metric."""
    return pareto(runs, metric) if metric else None


def sheet_of(folder: Path, run: Run) -> Path | None:
    """The images of a run: of its evaluation, else its last grid, else those of the whole sweep; None = there are none.

    Args:
        folder: of the sweep.
        run: one of it.
    """
    places = [run.folder / "samples" / "grid.png", *sorted(run.folder.glob("samples/step_*.png"), reverse=True)]
    return next((path for path in (*places, folder / "samples.png") if path.is_file()), None)

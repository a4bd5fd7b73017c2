"""Small images of what every method generates: the first ones of each run's grid, all from the same noise."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ditune.generation.grids import sheet
from ditune.report.results import Run

GRID_COLUMNS, GRID_PAD = 8, 2  # of samples/grid.png
ROWS = 2  # shown of each grid
MANY = 2  # datasets beyond which a run shows half of the columns
WIDTH = 2048  # pixels of all datasets side by side, at most
Shown = dict[tuple[str, str], Run]


def shown_runs(runs: Sequence[Run]) -> Shown:
    """The run to show of each method and dataset: the finished one with samples that has the least seed."""
    chosen: Shown = {}
    for run in sorted((run for run in runs if run.finished), key=lambda run: run.result["seed"]):
        if grid_of(run).is_file():
            chosen.setdefault((run.method, run.data), run)
    return chosen


def axes_of(chosen: Shown, runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Methods and datasets that have something to show, in the order of the runs."""
    methods = dict.fromkeys(run.method for run in runs if any(run.method == method for method, _ in chosen))
    data = dict.fromkeys(run.data for run in runs if any(run.data == name for _, name in chosen))
    return list(methods), list(data)


def grid_of(run: Run) -> Path:
    """The file of the evaluation's images."""
    return run.folder / "samples" / "grid.png"


def thumbnail(run: Run, columns: int, side: int) -> Image.Image:
    """The first two rows of a run's grid.

    Args:
        run: with samples.
        columns: images of each row.
        side: pixels of an image, at most; smaller ones stay as they are.
    """
    with Image.open(grid_of(run)) as grid:
        across = max(1, min(GRID_COLUMNS, int(run.values.get("n", GRID_COLUMNS))))
        step = (grid.width - GRID_PAD) // across
        box = (0, 0, min(columns, across) * step + GRID_PAD, min(grid.height, ROWS * step + GRID_PAD))
        top = grid.convert("RGB").crop(box)
    factor = min(1.0, side / (step - GRID_PAD))
    return top.resize((round(top.width * factor), round(top.height * factor)), Image.Resampling.LANCZOS)


def shown_columns(data: Sequence[str]) -> int:
    """Images beside each other in one thumbnail."""
    return GRID_COLUMNS if len(data) <= MANY else GRID_COLUMNS // 2


def methods_sheet(runs: Sequence[Run]) -> Image.Image | None:
    """Samples of all methods: methods in rows, datasets in columns; about 2,000 pixels wide at most.

    Of several seeds the first one is shown.

    Args:
        runs: of the sweep.

    Returns:
        The grid; None if no run has samples.
    """
    chosen = shown_runs(runs)
    if not chosen:
        return None
    methods, data = axes_of(chosen, runs)
    columns = shown_columns(data)
    side = max(8, WIDTH // (columns * len(data)))
    tops = {key: thumbnail(run, columns, side) for key, run in chosen.items()}
    size = tuple(max(top.size[k] for top in tops.values()) for k in (0, 1))
    table = []
    for method in methods:
        images = [tops.get((method, name), Image.new("RGB", size, "white")) for name in data]
        padded = [image if image.size == size else _padded(image, size) for image in images]
        table.append([(image, f"{method}, {name}") for image, name in zip(padded, data, strict=True)])
    return sheet(table, pad=8)


def _padded(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    canvas = Image.new("RGB", size, "white")
    canvas.paste(image)
    return canvas

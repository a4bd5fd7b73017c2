"""The runs of a sweep as one table: mean and deviation over seeds, nothing for what did not finish."""

import json
import statistics
from collections import defaultdict
from pathlib import Path

from ditune.checkpoints import read_json
from ditune.errors import UserError

# column: (path in result.json, factor, format)
COLUMNS = {
    "trainable parameters": (("parameters", "trainable"), 1, "{:,.0f}"),
    "share": (("parameters", "share"), 100, "{:.2f} %"),
    "test loss before": (("denoising", "before"), 1, "{:.4f}"),
    "test loss after": (("denoising", "after"), 1, "{:.4f}"),
    "KID before": (("metrics", "before", "kid_efflite0"), 1, "{:.4f}"),
    "KID after": (("metrics", "after", "kid_efflite0"), 1, "{:.4f}"),
    "nearest": (("metrics", "after", "nearest_mean"), 1, "{:.3f}"),
    "images/s": (("images_per_second",), 1, "{:.0f}"),
    "seconds": (("seconds", "fit"), 1, "{:.0f}"),
}


def read_results(folder: str | Path) -> list[dict]:
    """result.json of every run below `folder`, sorted by path.

    Raises:
        UserError: there is none.
    """
    paths = sorted(Path(folder).rglob("result.json"))
    if not paths:
        raise UserError(f"There is no result.json below {folder}. Give the folder of a sweep, or of a run.")
    return [read_json(path) for path in paths]


def markdown_table(results: list[dict]) -> str:
    """One row for each method and its settings, in the order of the first run; the seeds are averaged."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for result in results:
        settings = (result["method"], f"{result['lr']:g}", result["max_steps"], result["data"]["name"], result["peft"])
        groups[json.dumps(settings)].append(result)
    lines = ["| method | lr | runs | " + " | ".join(COLUMNS) + " |", "|---|---|---|" + "---|" * len(COLUMNS)]
    for runs in groups.values():
        finished = [run for run in runs if run["status"] == "finished"]
        cells = [_cell(finished, *column) for column in COLUMNS.values()]
        lines.append(
            f"| {runs[0]['method']} | {runs[0]['lr']:g} | {len(finished)} of {len(runs)} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines) + "\n"


def _cell(runs: list[dict], path: tuple[str, ...], factor: float, form: str) -> str:
    values = [value * factor for run in runs if (value := _at(run, path)) is not None]
    if not values:
        return "not run"
    text = form.format(statistics.fmean(values))
    if len(values) > 1 and (deviation := statistics.stdev(values)) > 0:
        text += " ± " + form.format(deviation)
    return text


def _at(result: dict, path: tuple[str, ...]) -> float | None:
    value = result
    for key in path:
        if key not in value:
            return None
        value = value[key]
    return value

"""Tables of a sweep as csv, Markdown and LaTeX."""

import csv
import io
from collections.abc import Sequence

from ditune.report.results import Row, Run, best, rows

NOT_RUN = "not run"
# column title: name of the number, factor, format; a metric's name stands for itself
COLUMNS = {
    "trainable parameters": ("parameters", 1, "{:,.0f}"),
    "share": ("share", 100, "{:.2f} %"),
    "test loss before": ("test_loss before", 1, "{:.4f}"),
    "test loss after": ("test_loss", 1, "{:.4f}"),
    "adapter MB": ("adapter_bytes", 1e-6, "{:.2f}"),
    "s/step": ("seconds_per_step", 1, "{:.3f}"),
    "images/s": ("images_per_second", 1, "{:.0f}"),
    "seconds": ("seconds", 1, "{:.0f}"),
}
HIDDEN = ("n", "n_reference")  # counts among the metrics; the protocol states them


def columns(runs: Sequence[Run]) -> dict[str, tuple[str, float, str]]:
    """Columns of a table: fixed ones, and between them the metrics that the runs have, `x before` beside `x`.

    Returns:
        (name of the number, factor, format) by column title.
    """
    names = list(dict.fromkeys(name for run in runs if run.finished for name in run.values))
    fixed = {name for name, _, _ in COLUMNS.values()} | set(HIDDEN) | {"peak_memory_mib"}
    metrics = [n for n in names if n not in fixed and not n.endswith((" before", "_std"))]
    paired = [pair for name in metrics for pair in (f"{name} before", name) if pair in names and pair not in fixed]
    titles = list(COLUMNS)
    middle = {name: (name, 1.0, "{:.4f}") for name in paired}
    head, tail = titles[:4], titles[4:]
    return {t: COLUMNS[t] for t in head} | middle | {t: COLUMNS[t] for t in tail}


def cell(row: Row, name: str, factor: float, form: str, bold: str = "", pm: str = " ± ") -> str:
    """Mean and deviation of a number.

    Args:
        row: the runs.
        name: of the number.
        factor: that values are multiplied by.
        form: format of values.
        bold: format of the cell such as **{}**; "" = none.
        pm: text between mean and deviation.
    """
    mean, deviation = row.mean(name), row.deviation(name)
    if mean is None:
        return NOT_RUN
    text = form.format(mean * factor)
    if deviation:
        text += pm + form.format(deviation * factor)
    return bold.format(text) if bold else text


def markdown_table(runs: Sequence[Run]) -> str:
    """Markdown table with a row per method, dataset and setting: means over seeds; the best on a dataset is bold."""
    table, chosen = rows(runs), columns(runs)
    winners = {name: best(table, name) for name, _, _ in chosen.values()}
    lines = ["| method | data | lr | steps | runs | " + " | ".join(chosen) + " |"]
    lines.append("|---|---|---|---|---|" + "---|" * len(chosen))
    for row in table:
        cells = [cell(row, *column, bold=_bold(row, column[0], winners)) for column in chosen.values()]
        start = [row.label, row.data, f"{row.lr:g}", f"{row.max_steps:,}", f"{len(row.finished)} of {len(row.runs)}"]
        lines.append("| " + " | ".join(start + cells) + " |")
    return "\n".join(lines) + "\n"


def latex_table(runs: Sequence[Run], metric: str) -> str:
    """LaTeX table of one metric as in papers: methods in rows, datasets in columns; needs the package booktabs."""
    table = rows(runs)
    data, winners = list(dict.fromkeys(row.data for row in table)), best(table, metric)
    settings = list(dict.fromkeys((row.label, row.lr, row.max_steps) for row in table))
    lines = [
        r"\begin{tabular}{lr" + "r" * len(data) + "}",
        r"\toprule",
        " & ".join(["Method", "Trained", *map(_escape, data)]) + r" \\",
        r"\midrule",
    ]
    for setting in settings:
        own = [row for row in table if (row.label, row.lr, row.max_steps) == setting]
        label = setting[0] if sum(s[0] == setting[0] for s in settings) == 1 else f"{setting[0]} ({setting[1]:g})"
        cells = [_escape(label), cell(own[0], *COLUMNS["share"]).replace("%", r"\%")]
        for name in data:
            found = next((row for row in own if row.data == name), None)
            mean = found.mean(metric) if found else None
            bold = r"\textbf{{{}}}" if mean is not None and mean == winners.get(name) else ""
            cells.append(cell(found, metric, 1, "{:.4f}", bold, r" $\pm$ ") if found else NOT_RUN)
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", f"% {metric}, mean and deviation over seeds"]) + "\n"


def csv_table(runs: Sequence[Run]) -> str:
    """CSV table with a line per run and all of its numbers."""
    start = ("folder", "status", "method", "data", "seed", "lr", "max_steps", "batch_size")
    names = list(dict.fromkeys(name for run in runs for name in run.values))
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*start, *names])
    for run in runs:
        result = run.result
        fixed = [run.folder.name, result["status"], run.method, run.data]
        fixed += [result.get(key) for key in start[4:]]
        writer.writerow([*fixed, *(run.values.get(name, "") for name in names)])
    return file.getvalue()


def _bold(row: Row, name: str, winners: dict[str, dict[str, float]]) -> str:
    mean = row.mean(name)
    return "**{}**" if mean is not None and winners[name].get(row.data) == mean else ""


def _escape(text: str) -> str:
    return text.replace("_", r"\_").replace("%", r"\%").replace("&", r"\&")

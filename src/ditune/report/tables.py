"""Tables of a sweep as csv, Markdown and LaTeX. All have their columns in one order: the metric of interest first."""

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from ditune.metrics.names import family
from ditune.report.pivot import Line, Pivot
from ditune.report.results import Row, Run, clear_best, main_metric, rows
from ditune.report.status import Job

NOT_RUN = "not run"
NO_BEFORE = "none, new classes"
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
COARSE = ("fid", "sfid", "fd", "is")  # families that papers print with two digits


def form(name: str) -> str:
    """Format of a metric's values."""
    kind = family(name)
    return "{:.2f}" if kind is not None and kind.name in COARSE else "{:.4f}"


def columns(runs: Sequence[Run], first: str | None = None) -> dict[str, tuple[str, float, str]]:
    """Columns of a table: the metric of interest, fixed ones, and between them other metrics, `x before` beside `x`.

    Args:
        runs: of the sweep.
        first: the metric of interest; None = the one that stands for a report.

    Returns:
        (name of the number, factor, format) by column title.
    """
    names = list(dict.fromkeys(name for run in runs if run.finished for name in run.values))
    first = first or main_metric([run for run in runs if run.finished])
    fixed = {name for name, _, _ in COLUMNS.values()} | set(HIDDEN) | {"peak_memory_mib"}
    metrics = [n for n in names if n not in fixed and not n.endswith((" before", "_std"))]
    paired = [pair for name in metrics for pair in (f"{name} before", name) if pair in names and pair not in fixed]
    titles = list(COLUMNS)
    found = {t: COLUMNS[t] for t in titles[:4]} | {name: (name, 1.0, form(name)) for name in paired}
    found |= {t: COLUMNS[t] for t in titles[4:]}
    head = {title: column for title, column in found.items() if column[0] == first}
    return head | found


def cell(row: Row, name: str, factor: float, form: str, bold: str = "", pm: str = " ± ") -> str:
    """Mean and deviation of a number; without one, why there is none.

    Args:
        row: the runs.
        name: of the number.
        factor: that values are multiplied by.
        form: format of values.
        bold: format of the cell such as **{}**; "" = none.
        pm: text between mean and deviation.
    """
    mean = row.mean(name)
    if mean is None:
        return absent(row, name)
    text = value(mean * factor, (row.deviation(name) or 0) * factor, form, pm)
    return bold.format(text) if bold else text


def value(mean: float, deviation: float | None, form: str, pm: str = " ± ") -> str:
    """A mean with its deviation, where there is one."""
    return form.format(mean) + (pm + form.format(deviation) if deviation else "")


def absent(row: Row, name: str) -> str:
    """Why a row has no such number: the status of its runs, or that nothing measured it."""
    if not row.finished:
        return counted(run.status[0] for run in row.runs)
    reinit = all(run.config.get("classes") == "reinit" for run in row.finished)
    return NO_BEFORE if name == "test_loss before" and reinit else NOT_RUN


def counted(statuses: Iterable[str]) -> str:
    """Statuses of jobs as words: `failed`, or `2 failed, 1 waiting`."""
    counts = Counter(statuses)
    if sum(counts.values()) <= 1:
        return next(iter(counts), NOT_RUN)
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def pivot_cell(table: Pivot, line: Line, data: str, bold: str = "", pm: str = " ± ") -> str:
    """What a pivot shows of a method on a dataset.

    Args:
        table: the pivot.
        line: the method.
        data: name of the dataset.
        bold: format of the best, such as **{}**.
        pm: text between mean and deviation.
    """
    row, statuses = line.rows.get(data), line.statuses(data)
    if row is None or row.mean(table.metric) is None:
        return absent(row, table.metric) if row is not None and row.finished else counted(statuses)
    text = cell(row, table.metric, 1, form(table.metric), bold if table.best.get(data) is line else "", pm)
    most = max(len(other.finished) for one in table.lines for other in one.rows.values())
    few = len(row.finished) < max(most, len(statuses))
    return f"{text} ({len(row.finished)} of {max(most, len(statuses))} seeds)" if few else text


def mean_cell(table: Pivot, line: Line, bold: str = "", pm: str = " ± ") -> str:
    """The mean over datasets; without one, on how many datasets there is a figure."""
    if line.mean is None:
        known = sum(row.mean(table.metric) is not None for row in line.rows.values())
        return f"{known} of {len(table.data)}"
    text = value(line.mean, line.deviation, form(table.metric), pm)
    return bold.format(text) if bold and table.best.get("") is line else text


def span(line: Line, name: str, text_of: Callable[[float], str]) -> str:
    """A number that may differ between datasets, such as the trained parameters; without one, `-`.

    Args:
        line: the method.
        name: of the number.
        text_of: its text, with a unit as the last word.
    """
    ends = line.span(name)
    if ends is None:
        return "-"
    low, high = (text_of(end) for end in ends)
    if low == high:
        return low
    return f"{low.rpartition(' ')[0] if low.split()[-1] == high.split()[-1] else low}-{high}"


def count(number: float) -> str:
    """A count in three digits: 703,904 is 704 k."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            digits = max(0, 2 - int(math.log10(number / size * 1.0005)))
            return f"{number / size:.{digits}f} {unit}"
    return f"{number:.0f}"


def percent(share: float) -> str:
    """A share of one."""
    return f"{100 * share:.2f} %"


def sizes(line: Line) -> list[str]:
    """Trained parameters of a method, and their share of all."""
    return [span(line, "parameters", count), span(line, "share", percent)]


def pivot_rows(table: Pivot, bold: str = "", pm: str = " ± ") -> list[list[str]]:
    """A pivot's heading and lines as text: method, datasets, mean and rank, trained parameters, share."""
    several = len(table.data) > 1
    found = [["method", *table.data, *(["mean", "rank"] if several else []), "trained", "share"]]
    for line in table.lines:
        cells = [pivot_cell(table, line, name, bold, pm) for name in table.data]
        if several:
            cells += [mean_cell(table, line, bold, pm), "-" if line.rank is None else f"{line.rank:.2f}"]
        found.append([line.label, *cells, *sizes(line)])
    return found


def markdown_pivot(table: Pivot, notes: Sequence[str]) -> str:
    """Markdown table of one metric: methods in rows, datasets in columns; below it what to know of it."""
    head, *lines = pivot_rows(table, "**{}**")
    text = [_line(head), "|---|" + "---:|" * (len(head) - 1), *map(_line, lines), ""]
    return "\n".join([f"{table.metric}", "", *text, *(f"- {note}" for note in notes)]) + "\n"


def latex_table(table: Pivot, notes: Sequence[str]) -> str:
    """LaTeX table of the same columns; needs the package booktabs."""
    head, *lines = pivot_rows(table, r"\textbf{{{}}}", r" $\pm$ ")
    text = [r"\begin{tabular}{l" + "r" * (len(head) - 1) + "}", r"\toprule", _latex(head), r"\midrule"]
    text += [*map(_latex, lines), r"\bottomrule", r"\end{tabular}", f"% {table.metric}"]
    return "\n".join([*text, *(f"% {note}" for note in notes)]) + "\n"


def csv_pivot(table: Pivot) -> str:
    """CSV of the same columns as plain numbers, each followed by its deviation; empty where there is none."""
    several, names = len(table.data) > 1, [*table.data]
    head = ["method", *(part for name in names for part in (name, f"{name} std"))]
    head += ["mean", "mean std", "rank"] if several else []
    body = []
    for line in table.lines:
        values: list[float | None] = []
        for name in names:
            row = line.rows.get(name)
            values += (None, None) if row is None else (row.mean(table.metric), row.deviation(table.metric))
        values += [line.mean, line.deviation, line.rank] if several else []
        body.append([line.label, *values, *(line.span("parameters") or (None, None))])
    return _csv([*head, "trained, least", "trained, greatest"], body)


def markdown_table(runs: Sequence[Run], first: str | None = None) -> str:
    """Markdown table with a row per method, dataset and setting: means over seeds; the clearly best one is bold.

    Args:
        runs: of the sweep.
        first: the metric of interest, in the first column; None = the one that stands for a report.
    """
    table, chosen = rows(runs), columns(runs, first)
    winners = {name: clear_best(table, name) for name, _, _ in chosen.values()}
    lead, *rest = chosen
    lines = [_line(["method", "data", lead, "status", *rest, "lr", "steps"])]
    lines.append("|---|---|---:|---|" + "---:|" * (len(rest) + 2))
    for row in table:
        first_cell, *cells = (
            cell(row, *column, bold="**{}**" if winners[column[0]].get(row.data) is row else "")
            for column in chosen.values()
        )
        status = counted(run.status[0] for run in row.runs)
        lines.append(_line([row.label, row.data, first_cell, status, *cells, f"{row.lr:g}", f"{row.max_steps:,}"]))
    return "\n".join(lines) + "\n"


def markdown_unfinished(runs: Sequence[Run], jobs: Sequence[Job]) -> str:
    """Markdown list of the jobs that have not finished, with the reason; "" if all have."""
    lines = []
    for run in runs:
        status, reason = run.status
        if status != "finished":
            lines.append(f"- {run.folder.name}, {run.method} on {run.data}: {_with_reason(status, reason)}")
    for job in jobs:
        name = f"{job.method} on {job.data}" if job.method and job.data else job.overrides
        lines.append(f"- {job.folder.name if job.folder else '-'}, {name}: {_with_reason(job.status, job.reason)}")
    return "\n".join(["", "Not finished:", "", *lines]) + "\n" if lines else ""


def csv_table(runs: Sequence[Run], first: str | None = None) -> str:
    """CSV table with a line per run and all of its numbers, the metric of interest first."""
    end = ("seed", "lr", "max_steps", "batch_size")
    names = list(dict.fromkeys(name for run in runs for name in run.values))
    names = sorted(names, key=lambda name: name != first)
    body = []
    for run in runs:
        status, reason = run.status
        numbers = [run.values.get(name, "") for name in names]
        start = [run.folder.name, run.method, run.data, *numbers[:1], status, reason]
        body.append([*start, *numbers[1:], *(run.result.get(key) for key in end)])
    return _csv(["folder", "method", "data", *names[:1], "status", "reason", *names[1:], *end], body)


def _with_reason(status: str, reason: str) -> str:
    return f"{status}: {reason}" if reason else status


def _csv(head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(body)
    return file.getvalue()


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(text.replace("|", r"\|") for text in cells) + " |"


def _latex(cells: Iterable[str]) -> str:
    return " & ".join(_escape(text) for text in cells) + r" \\"


def _escape(text: str) -> str:
    return text.replace("_", r"\_").replace("%", r"\%").replace("&", r"\&").replace("#", r"\#")

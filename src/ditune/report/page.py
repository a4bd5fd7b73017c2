"""A report of a sweep as one HTML page, which opens from disk without a server or a network."""

import html
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from ditune.report import markup, tables
from ditune.report.markup import Column, td
from ditune.report.notes import BOLD, NO_BEFORE, notes
from ditune.report.page_style import SCRIPT, STYLE
from ditune.report.pivot import Line, Pivot
from ditune.report.plots import curve_panels, pareto_panels
from ditune.report.published import published
from ditune.report.results import Row, Run, clear_best, rows
from ditune.report.status import Job
from ditune.report.thumbnails import MANY, axes_of, grid_of, shown_columns, shown_runs, thumbnail

SIDE, LARGE_SIDE = 64, 112  # pixels of an image in a thumbnail: of many datasets, and of one or two
SEVERAL_SEEDS = "Of several seeds the first one is shown. An image opens the full grid."


def html_page(folder: Path, runs: Sequence[Run], jobs: Sequence[Job], table: Pivot | None) -> str:
    """The page: tables that can be sorted by every column, plots and thumbnails of samples.

    Args:
        folder: of the sweep, where the page will lie.
        runs: with a result.
        jobs: without one.
        table: methods x datasets; None = no run has a metric.

    Returns:
        HTML with everything embedded; its links lead to the runs' own files.
    """
    title = html.escape(folder.resolve().name)
    parts = [f"<h1>{title}</h1>", f"<p>{html.escape(_summary(runs, jobs))}</p>"]
    sections = {"Runs": runs_table(runs, jobs, table.metric if table else None)}
    if table is not None:
        sections = {
            f"{table.metric}, methods and datasets": pivot_table(table) + markup.notes(notes(table, runs)),
            "Published figures": published_table(table),
            "Trained parameters and quality": markup.panels(pareto_panels(runs, table.metric)),
            "Samples of every method from the same noise": samples_table(folder, runs),
            "All numbers": methods_table(runs, table.metric) + markup.notes(_notes_of_numbers(runs)),
            "Training": markup.panels(curves) if (curves := curve_panels(runs)) else "",
        } | sections
    parts += [f"<section><h2>{html.escape(name)}</h2>{part}</section>" for name, part in sections.items() if part]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
        f"{''.join(parts)}<script>{SCRIPT}</script></body></html>\n"
    )


def pivot_table(table: Pivot) -> str:
    """HTML table of one metric: methods in rows, datasets in columns; on a phone mean and rank stand first."""
    several = len(table.data) > 1
    middle: list[Column] = [(name, "") for name in table.data]
    ends: list[Column] = [("mean", "wide"), ("rank", "wide")] if several else []
    starts: list[Column] = [("mean", "narrow"), ("rank", "narrow")] if several else []
    columns = [("method", "text"), *starts, *middle, *ends, ("trained", ""), ("share", "")]
    body = []
    for line in table.lines:
        best = "best" if table.best.get("") is line else "" if line.mean is not None else "none"
        rank = "-" if line.rank is None else f"{line.rank:.2f}"
        means = [td(tables.mean_cell(table, line), _value(line.mean), best), td(rank, _value(line.rank))]
        ends = [line.span(name) for name in ("parameters", "share")]
        sizes = [td(text, _value(end and end[0])) for text, end in zip(tables.sizes(line), ends, strict=True)]
        cells = [_pivot_cell(table, line, name) for name in table.data]
        pair = means if several else []
        body.append([td(line.label, line.label), *pair, *cells, *pair, *sizes])
    return markup.table(columns, body)


def published_table(table: Pivot) -> str:
    """HTML table of published figures beside ours, each with its protocol; "" if none is known."""
    columns = [("method", "text"), ("paper", ""), ("ours", ""), ("data", "text"), ("source", "text")]
    columns += [("the paper's protocol", "text"), ("our protocol", "text")]
    body, sources = [], []
    for line in table.lines:
        for name, row in line.rows.items():
            for figure in published(line.method, name, table.metric, row.runs[0].config):
                ours = td(tables.pivot_cell(table, line, name), _value(row.mean(table.metric)))
                sources += [] if figure.source in sources else [figure.source]
                place = f"[{sources.index(figure.source) + 1}]"
                start = [td(line.label, line.label), td(f"{figure.value:g}", figure.value), ours, td(name, name)]
                protocols = (figure.protocol, our_protocol(row, table.metric))
                body.append([*start, td(place, place), *(td(text, text, "long") for text in protocols)])
    below = [f"[{number}] {source}." for number, source in enumerate(sources, 1)]
    return markup.table(columns, body) + markup.notes(below) if body else ""


def our_protocol(row: Row, metric: str) -> str:
    """How runs were trained and evaluated."""
    run = next((run for run in row.finished if run.protocol(metric)), row.runs[0])
    result, protocol = run.result, run.protocol(metric)
    network = run.config.get("network.name")
    parts = [network] if network else []
    parts.append(f"{result['max_steps']:,} steps of {result['batch_size']} images")
    if protocol:
        sampler = str(protocol.get("sampler", "")).split(" ")[0]
        parts.append(f"{protocol['n']:,} images, {sampler} {protocol.get('steps')} steps")
        parts.append(f"guidance {protocol.get('guidance')}")
    return ", ".join(parts)


def samples_table(folder: Path, runs: Sequence[Run]) -> str:
    """HTML table of thumbnails that link to the full grids; "" if no run has samples."""
    chosen = shown_runs(runs)
    if not chosen:
        return ""
    methods, data = axes_of(chosen, runs)
    columns = shown_columns(data)
    side = SIDE if len(data) > MANY else LARGE_SIDE
    body = []
    for method in methods:
        cells = []
        for name in data:
            run = chosen.get((method, name))
            if run is None:
                own = [other for other in runs if (other.method, other.data) == (method, name)]
                cells.append(html.escape(tables.counted(other.status[0] for other in own)))
                continue
            link = quote(Path(os.path.relpath(grid_of(run), folder)).as_posix())
            cells.append(markup.thumbnail(thumbnail(run, columns, side), f"{method} on {name}", link))
        body.append((method, cells))
    return markup.gallery(data, body) + markup.notes([SEVERAL_SEEDS])


def methods_table(runs: Sequence[Run], first: str | None = None) -> str:
    """HTML table with a row per method, dataset and setting: means and deviations over seeds.

    Args:
        runs: of the sweep.
        first: the metric of interest, directly after the method's name.
    """
    numbers, chosen = rows(runs), tables.columns(runs, first)
    winners = {name: clear_best(numbers, name) for name, _, _ in chosen.values()}
    lead, *rest = chosen
    columns: list[Column] = [("method", "text"), (lead, ""), ("data", "text"), ("status", "text")]
    columns += [(name, "") for name in (*rest, "lr", "steps")]
    body = []
    for row in numbers:
        cells = [_mean(row, *column, winners[column[0]].get(row.data) is row) for column in chosen.values()]
        start = [
            td(row.label, row.label),
            cells[0],
            td(row.data, row.data),
            _status([run.status[0] for run in row.runs]),
        ]
        body.append([*start, *cells[1:], td(f"{row.lr:g}", row.lr), td(f"{row.max_steps:,}", row.max_steps)])
    return markup.table(columns, body)


def runs_table(runs: Sequence[Run], jobs: Sequence[Job] = (), first: str | None = None) -> str:
    """HTML table with a row per job, its status and the reason for it, and a column per number."""
    names = list(dict.fromkeys(name for run in runs for name in run.values))
    names = sorted(names, key=lambda name: name != first)
    columns: list[Column] = [("folder", "text"), *((name, "") for name in names[:1]), ("status", "text")]
    columns += [(name, "text") for name in ("method", "data")]
    columns += [("seed", ""), ("reason", "text"), *((name, "") for name in names[1:])]
    body = []
    for run in runs:
        status, reason = run.status
        numbers = [_number(run.values.get(name), status) for name in names]
        start = [td(run.folder.name, run.folder.name), *numbers[:1], _status([status])]
        start += [td(run.method, run.method), td(run.data, run.data), td(str(run.result["seed"]), run.result["seed"])]
        body.append([*start, td(reason, reason, "long" if reason else ""), *numbers[1:]])
    for job in jobs:
        name = job.folder.name if job.folder else "-"
        none = [_number(None, job.status) for _ in names]
        reason = ": ".join(filter(None, (job.overrides, job.reason)))
        start = [td(name, name), *none[:1], _status([job.status]), td(job.method or "-"), td(job.data or "-"), td("-")]
        body.append([*start, td(reason, reason, "long"), *none[1:]])
    return markup.table(columns, body)


def _pivot_cell(table: Pivot, line: Line, name: str) -> tuple[str, str, str]:
    row = line.rows.get(name)
    mean = row.mean(table.metric) if row else None
    text = tables.pivot_cell(table, line, name)
    if mean is None:
        return td(text, "", f"none {' '.join(dict.fromkeys(line.statuses(name)))}")
    return td(text, mean, "best" if table.best.get(name) is line else "")


def _mean(row: Row, name: str, factor: float, form: str, best: bool) -> tuple[str, str, str]:
    text, mean = tables.cell(row, name, factor, form), row.mean(name)
    if mean is None:
        statuses = [] if row.finished else dict.fromkeys(run.status[0] for run in row.runs)
        return td(text, "", " ".join(("none", *statuses)))
    return td(text, mean, "best" if best else "")


def _status(statuses: Sequence[str]) -> tuple[str, str, str]:
    text = tables.counted(statuses)
    return td(text, text, " ".join(status for status in dict.fromkeys(statuses) if status != "finished"))


def _number(number: float | None, status: str) -> tuple[str, str, str]:
    if number is None:
        return td(tables.NOT_RUN if status == "finished" else status, "", f"none {status}")
    return td(f"{number:,}" if isinstance(number, int) else f"{number:.4g}", number)


def _value(number: float | None) -> object:
    return "" if number is None else number


def _summary(runs: Sequence[Run], jobs: Sequence[Job]) -> str:
    statuses = Counter([run.status[0] for run in runs] + [job.status for job in jobs])
    finished, count = statuses.pop("finished", 0), len(runs) + len(jobs)
    others = "".join(f", {number} {status}" for status, number in statuses.items())
    images = {run.result.get("metrics", {}).get("protocol", {}).get("n") for run in runs if run.finished} - {None}
    measured = f" Metrics of {' or '.join(f'{n:,}' for n in sorted(images))} images." if images else ""
    return f"{finished} of {count} jobs have finished{others}.{measured}"


def _notes_of_numbers(runs: Sequence[Run]) -> list[str]:
    missing = any(tables.absent(row, "test_loss before") == tables.NO_BEFORE for row in rows(runs) if row.finished)
    return [BOLD, *([NO_BEFORE] if missing else [])]

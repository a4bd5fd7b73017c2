"""Writing all files of a report."""

from pathlib import Path

from ditune.errors import UserError
from ditune.files.atomic import atomic
from ditune.report.gap_plots import learned_and_forgotten
from ditune.report.gap_tables import gaps_markdown
from ditune.report.notes import notes
from ditune.report.page import html_page
from ditune.report.pivot import pivot
from ditune.report.plots import curves, pareto
from ditune.report.results import find_results, main_metric
from ditune.report.status import jobs_without_result
from ditune.report.tables import csv_pivot, csv_table, latex_table, markdown_pivot, markdown_table, markdown_unfinished
from ditune.report.thumbnails import methods_sheet

DPI = 140


def write_report(sweep: str | Path, metric: str | None = None) -> str:
    """Write the tables, plots and the page of a sweep.

    They are results.csv, table.csv, table.md, table.tex, gaps.md, pareto.png, forgotten.png, curves.png, samples.png
    and report.html; those that the runs have no figures for are left out.

    Args:
        sweep: folder with runs below it; gets the files.
        metric: of interest, which stands first and is compared; None = FID if there is one, else KID, else another.

    Returns:
        The Markdown table.

    Raises:
        UserError: there are no runs, or none has the metric.
    """
    folder, runs = Path(sweep), find_results(sweep)
    jobs = jobs_without_result(folder, [run.folder for run in runs])
    if not runs and not jobs:
        raise UserError(f"There is no result.json of a training below {sweep}. Give the folder of a sweep, or a run.")
    finished = [run for run in runs if run.finished]
    known = {name for run in finished for name in run.values}
    if metric is not None and metric not in known:
        raise UserError(f"No run has the metric {metric}. Choose one of these: {', '.join(sorted(known))}.")
    metric = metric or main_metric(finished)
    markdown = markdown_table(runs, metric) + markdown_unfinished(runs, jobs)
    table, texts = None, {"results.csv": csv_table(runs, metric)}
    if metric is not None:
        table = pivot(runs, jobs, metric)
        below = notes(table, runs)
        texts |= {"table.tex": latex_table(table, below), "table.csv": csv_pivot(table)}
        if len(table.data) > 1:
            markdown = f"{markdown_pivot(table, below)}\n{markdown}"
        pareto(runs, metric).savefig(folder / "pareto.png", dpi=DPI)
    texts |= {"table.md": markdown, "report.html": html_page(folder, runs, jobs, table)}
    if (of_gaps := gaps_markdown(runs)) is not None:
        texts["gaps.md"] = of_gaps
        if (plane := learned_and_forgotten(runs)) is not None:
            plane.savefig(folder / "forgotten.png", dpi=DPI)
    if any((run.folder / "metrics.csv").is_file() for run in runs):
        curves(runs).savefig(folder / "curves.png", dpi=DPI)
    samples = methods_sheet(runs)
    if samples is not None:
        samples.save(folder / "samples.png")
    for name, text in texts.items():
        with atomic(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return markdown

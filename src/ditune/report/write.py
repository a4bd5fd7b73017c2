"""Writing all files of a report."""

from pathlib import Path

from ditune.errors import UserError
from ditune.files.atomic import atomic
from ditune.report.page import html_page
from ditune.report.plots import curves, methods_sheet, pareto
from ditune.report.results import main_metric, read_results
from ditune.report.tables import csv_table, latex_table, markdown_table


def write_report(sweep: str | Path, metric: str | None = None) -> str:
    """Write results.csv, table.md, table.tex, pareto.png, curves.png, samples.png and report.html.

    Args:
        sweep: folder with runs below it; gets the files.
        metric: of the LaTeX table and the Pareto plot; None = FID if there is one, else KID, else another.

    Returns:
        The Markdown table.

    Raises:
        UserError: there are no runs, or none has the metric.
    """
    folder, runs = Path(sweep), read_results(sweep)
    known = {name for run in runs if run.finished for name in run.values}
    if metric is not None and metric not in known:
        raise UserError(f"No run has the metric {metric}. Choose one of these: {', '.join(sorted(known))}.")
    metric = metric or main_metric([run for run in runs if run.finished])
    markdown, figures, sheets = markdown_table(runs), {"Training": curves(runs)}, {}
    texts = {"results.csv": csv_table(runs), "table.md": markdown}
    if metric is not None:
        texts["table.tex"] = latex_table(runs, metric)
        figures = {"Trained parameters and quality": pareto(runs, metric)} | figures
        figures["Trained parameters and quality"].savefig(folder / "pareto.png", dpi=140)
    figures["Training"].savefig(folder / "curves.png", dpi=140)
    samples = methods_sheet(runs)
    if samples is not None:
        sheets["Samples of every method from the same noise"] = samples
        samples.save(folder / "samples.png")
    texts["report.html"] = html_page(folder.resolve().name, runs, figures, sheets)
    for name, text in texts.items():
        with atomic(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return markdown

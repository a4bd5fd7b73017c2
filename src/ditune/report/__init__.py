"""The runs of a sweep as csv, Markdown, LaTeX, plots, sheets and one page."""

from ditune.report.results import Run, read_results
from ditune.report.tables import markdown_table

__all__ = ["Run", "markdown_table", "read_results"]

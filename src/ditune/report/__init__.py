"""Reports of a sweep: tables (csv, Markdown, LaTeX), plots, sample grids and one HTML page."""

from ditune.report.results import Run, read_results
from ditune.report.tables import markdown_table

__all__ = ["Run", "markdown_table", "read_results"]

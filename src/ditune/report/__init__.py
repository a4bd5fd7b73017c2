"""The runs of a sweep as csv, Markdown, LaTeX, plots, sheets and one page."""

from .results import Run, read_results
from .tables import markdown_table

__all__ = ["Run", "markdown_table", "read_results"]

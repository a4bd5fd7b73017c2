"""A report of a sweep as one HTML page, which opens from disk without a server or a network."""

import base64
import html
import io
from collections.abc import Sequence

from matplotlib.figure import Figure
from PIL import Image

from ditune.report.results import Row, Run, best, rows
from ditune.report.tables import NOT_RUN, columns

STYLE = """
:root { color-scheme: light dark; --line: #8884; --mark: #3a86ff22; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
td.text { text-align: left; } td.best { font-weight: 700; background: var(--mark); } td.none { opacity: .5; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
img { max-width: 100%; height: auto; display: block; background: #fff; }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  table.querySelectorAll("th").forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = row => row.cells[column].dataset.value;
      const missing = row => value(row) === "";
      const compare = (a, b) => {
        if (missing(a) || missing(b)) return missing(a) - missing(b);  // rows without a value stay at the end
        const [x, y] = [value(a), value(b)];
        const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
        return down ? -order : order;
      };
      const body = table.tBodies[0];
      [...body.rows].sort(compare).forEach(row => body.append(row));
    });
  });
}
"""


def html_page(title: str, runs: Sequence[Run], figures: dict[str, Figure], sheets: dict[str, Image.Image]) -> str:
    """The page: tables that can be sorted by every column, plots and sample grids.

    Args:
        title: of the page.
        runs: of the sweep.
        figures: plots by their headings.
        sheets: images by their headings.

    Returns:
        HTML with everything embedded.
    """
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{_summary(runs)}</p>", "<h2>Methods</h2>", methods_table(runs)]
    images = {name: _figure(figure) for name, figure in figures.items()}
    images |= {name: _image(image) for name, image in sheets.items()}
    for name, data in images.items():
        text = html.escape(name)
        parts.append(f'<h2>{text}</h2><img alt="{text}" src="data:image/png;base64,{data}">')
    parts += ["<h2>Runs</h2>", runs_table(runs)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"{''.join(parts)}<script>{SCRIPT}</script></body></html>\n"
    )


def methods_table(runs: Sequence[Run]) -> str:
    """HTML table with a row per method, dataset and setting: means and deviations over seeds."""
    table, chosen = rows(runs), columns(runs)
    winners = {name: best(table, name) for name, _, _ in chosen.values()}
    body = []
    for row in table:
        start = [_text(row.label), _text(row.data), _number(row.lr, f"{row.lr:g}"), _number(row.max_steps)]
        start.append(_number(len(row.finished), f"{len(row.finished)} of {len(row.runs)}"))
        body.append([*start, *(_mean(row, *column, winners[column[0]]) for column in chosen.values())])
    return _table(["method", "data", "lr", "steps", "runs", *chosen], body)


def runs_table(runs: Sequence[Run]) -> str:
    """HTML table with a row per run and a column per number."""
    names = list(dict.fromkeys(name for run in runs for name in run.values))
    body = []
    for run in runs:
        start = [_text(run.folder.name), _text(run.method), _text(run.data), _number(run.result["seed"])]
        start.append(_text(run.result["status"]))
        values = run.values
        body.append([*start, *(_number(values[n], _short(values[n])) if n in values else _none() for n in names)])
    return _table(["folder", "method", "data", "seed", "status", *names], body)


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col"><button>{html.escape(name)}</button></th>' for name in heads)
    lines = "".join(f"<tr>{''.join(cells)}</tr>" for cells in body)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _mean(row: Row, name: str, factor: float, form: str, winners: dict[str, float]) -> str:
    mean, deviation = row.mean(name), row.deviation(name)
    if mean is None:
        return _none()
    text = form.format(mean * factor) + (f" ± {form.format(deviation * factor)}" if deviation else "")
    return _number(mean, text, "best" if winners.get(row.data) == mean else "")


def _text(value: str) -> str:
    return f'<td class="text" data-value="{html.escape(value)}">{html.escape(value)}</td>'


def _number(value: float, text: str | None = None, kind: str = "") -> str:
    return f'<td class="{kind}" data-value="{value!r}">{html.escape(text or f"{value:,}")}</td>'


def _none() -> str:
    return f'<td class="none" data-value="">{NOT_RUN}</td>'


def _short(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _summary(runs: Sequence[Run]) -> str:
    finished = sum(run.finished for run in runs)
    counts = {run.result.get("metrics", {}).get("protocol", {}).get("n") for run in runs if run.finished} - {None}
    measured = f" Metrics of {' or '.join(map(str, sorted(counts)))} images." if counts else ""
    means = " Mean ± deviation over seeds; the best of a data set is bold."
    return f"{finished} of {len(runs)} runs have finished.{means}{measured}"


def _figure(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=140)
    return base64.b64encode(file.getvalue()).decode()


def _image(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()

"""Style and script of a report's page."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --mark: #3a86ff22; --bad: #c1121f; }
* { box-sizing: border-box; }
body { background: Canvas; font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 84rem; padding: 1rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.scroll { overflow-x: auto; width: fit-content; max-width: 100%; border: 1px solid var(--line); border-radius: 6px; }
.notes { font-size: .875rem; margin: .5rem 0; padding-left: 1.2rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th.text, td.text { text-align: left; } td.long { white-space: normal; min-width: 20rem; }
th:first-child, td:first-child { position: sticky; left: 0; background: Canvas; z-index: 1; }
td.best { font-weight: 700; background: var(--mark); } td.none { opacity: .6; }
td.failed, td.killed, td.refused { color: var(--bad); opacity: 1; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
img { max-width: 100%; height: auto; display: block; background: #fff; }
.panels { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
.samples td { vertical-align: top; } .samples img { max-width: none; }
.narrow { display: none; }
@media (max-width: 40rem) {
  .narrow { display: table-cell; } .wide { display: none; } td.long { min-width: 34rem; }
  th:first-child, td:first-child { white-space: normal; min-width: 6.5rem; }
}
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sorted")) {
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

"""Tables of docs/results/speed.md from the JSON files of the benchmarks.

    python benchmarks/tables.py

A table stands between `<!-- name -->` and `<!-- end of name -->`, where docs/results/speed/name.json has its rows.
"""

import json
import re
from pathlib import Path

from measuring import described, table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results" / "speed.md"
MARKED = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end of \2 -->)", flags=re.DOTALL)


def filled(text: str, folder: Path) -> str:
    """A page with the tables of the JSON files in a folder."""

    def replaced(match: re.Match) -> str:
        result = json.loads((folder / f"{match[2]}.json").read_text(encoding="utf-8"))
        command = " ".join(f"--{name} {value}" for name, value in result["settings"].items())
        script = f"python benchmarks/{result['benchmark']}.py --device {result['device']['kind']} {command}"
        return f"{match[1]}On {described(result)}: `{script}`\n\n{table(result)}{match[3]}"

    return MARKED.sub(replaced, text)


def main() -> None:
    """Rewrite the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), PAGE.with_suffix("")), encoding="utf-8")


if __name__ == "__main__":
    main()

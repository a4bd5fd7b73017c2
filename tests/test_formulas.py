"""docs/formulas.md names only symbols that exist."""

import re
from importlib import import_module

import pytest

from helpers import ROOT

PAGE = (ROOT / "docs" / "formulas.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("|")][2:]  # without the head
# `module: symbol, symbol` of every row's last column
SYMBOLS = [
    (module, symbol)
    for row in ROWS
    for module, symbols in re.findall(r"`([\w.]+): ([^`]+)`", row.split("|")[-2])
    for symbol in symbols.split(", ")
]


def test_every_row_names_a_symbol():
    assert len(SYMBOLS) > 60
    assert not [row for row in ROWS if not re.search(r"`[\w.]+: [^`]+` \|$", row)]


@pytest.mark.parametrize(("module", "symbol"), SYMBOLS, ids=lambda value: value)
def test_symbol_exists(module, symbol):
    found = import_module(f"ditune.{module}")
    for name in symbol.split("."):
        found = getattr(found, name)

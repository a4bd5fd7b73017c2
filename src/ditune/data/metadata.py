"""Tables beside images: metadata.csv and metadata.jsonl, with file_name and any other columns, all as text."""

import csv
import io
import json
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property

from ditune.data.sources import Source
from ditune.errors import UserError

UNREADABLE = (OSError, ValueError, RuntimeError, MemoryError, zlib.error, zipfile.BadZipFile, csv.Error)


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of a metadata file.

    Args:
        source: where the file lies.
        name: of the file.
        folder: that the column file_name is relative to; "" = the top.
        columns: their names.
        rows: values as text, by column.
        first_line: line of the first row, as editors count.
    """

    source: Source
    name: str
    folder: str
    columns: list[str]
    rows: list[dict[str, str]]
    first_line: int

    @cached_property
    def _present(self) -> frozenset[str]:
        return frozenset(self.source.names)

    @cached_property
    def _lines(self) -> dict[int, int]:
        return {id(row): line for line, row in enumerate(self.rows, start=self.first_line)}

    def need(self, *columns: str) -> None:
        """Require columns.

        Raises:
            UserError: the table lacks one of them.
        """
        for column in columns:
            if column not in self.columns:
                raise UserError(
                    f"{self.name} in {self.source.path} has no column '{column}'. "
                    f"It has these: {', '.join(self.columns)}."
                )

    def line(self, row: dict[str, str]) -> int:
        """Line of a row in the file, as editors count."""
        return self._lines[id(row)]

    def file_of(self, row: dict[str, str]) -> str:
        """Path of a row's image inside the source.

        Raises:
            UserError: there is no such file.
        """
        raw = row["file_name"]
        for name in (raw, raw.replace("\\", "/").removeprefix("./")):
            path = f"{self.folder}/{name}" if self.folder else name
            if path in self._present:
                return path
        raise UserError(
            f"{self.name} in {self.source.path} names '{raw}', which is not there. Add the file or remove the row."
        )


def read_table(source: Source, name: str, folder: str) -> Table:
    """Read a metadata file of a source.

    Args:
        source: holds the file.
        name: of the file; its end says whether it is CSV or JSON lines.
        folder: what file_name is relative to.

    Raises:
        UserError: it cannot be read.
    """
    try:
        text = source.read(name).decode("utf-8-sig")
        if name.lower().endswith(".jsonl"):
            return Table(source, name, folder, *_json_lines(text, f"{name} in {source.path}"), first_line=1)
        reader = csv.DictReader(io.StringIO(text, newline=""), restval="")
        rows = list(reader)
    except UNREADABLE as error:
        raise UserError(f"{name} in {source.path} cannot be read ({error}). Save it as plain UTF-8 text.") from error
    return Table(source, name, folder, list(reader.fieldnames or []), rows, first_line=2)


def _json_lines(text: str, where: str) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of JSON lines; a row that lacks a column has '' there."""
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"Line {number} of {where} is no JSON ({error}). Correct or remove it.") from error
        if not isinstance(row, dict):
            raise UserError(f'Line {number} of {where} is no JSON object such as {{"file_name": ...}}. Correct it.')
        found.append({key: _text(value) for key, value in row.items()})
    columns = list(dict.fromkeys(key for row in found for key in row))
    return columns, [dict.fromkeys(columns, "") | row for row in found]


def _text(value: object) -> str:
    """Labels that are numbers become text; nothing becomes ''."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

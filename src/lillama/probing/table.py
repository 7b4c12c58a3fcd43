"""Tables as people write them: commas, tabs or semicolons, JSON lines, columns in any order and spelling of case."""

import csv
import io
import json
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lillama.corpus.paths import whole_text
from lillama.errors import ProbeError, suggestion
from lillama.model.tokenizer import refuse_halves

Row = dict[str, str]
SEPARATORS = ",\t;"
SHOWN = 60  # characters of a wrong cell


@dataclass(frozen=True)
class Table:
    """Rows of text cells.

    Attributes:
        path: the file.
        columns: that it has.
        rows: column -> cell.
        lines: the rows' line numbers in the file.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    lines: tuple[int, ...]

    def require(self, columns: Iterable[str]) -> None:
        """Raise `ProbeError` where a column is missing or one of its cells is empty or blank."""
        wanted = list(columns)
        for column in wanted:
            if column not in self.columns:
                near = suggestion(column, self.columns)
                raise ProbeError(f"{self.path}: column {column!r} is missing; found {', '.join(self.columns)}{near}")
        for line, row in zip(self.lines, self.rows, strict=True):
            empty = next((column for column in wanted if not row[column].strip()), None)
            if empty is not None:
                raise ProbeError(f"{self.path}, line {line}: {empty!r} is empty")

    def number(self, index: int, column: str) -> float:
        """Return a cell as a finite number."""
        cell = self.rows[index][column]
        try:
            value = float(cell)
        except ValueError:
            raise ProbeError(
                f"{self.path}, line {self.lines[index]}: {column!r} is {cell!r}; it must be a number"
            ) from None
        if value in (float("inf"), float("-inf")) or value != value:
            raise ProbeError(f"{self.path}, line {self.lines[index]}: {column!r} is {cell}; it must be finite")
        return value


def read_table(path: Path, wanted: Iterable[str], texts: Collection[str]) -> Table:
    """Read a table; columns that differ from a wanted one in case, spaces, `_` or `-` alone take its name.

    Args:
        path: CSV, TSV or JSON lines (.jsonl).
        wanted: column names as the reader spells them.
        texts: those of the columns in which JSON must hold texts, or null for an empty cell.

    Raises:
        ProbeError: the file is empty or not what its name says, or a text is none.
    """
    text = whole_text(path, ProbeError)
    numbered = list(_json_rows(path, text) if path.suffix in (".jsonl", ".json") else _delimited_rows(path, text))
    if not numbered:
        raise ProbeError(f"{path}: no rows in this file")
    spelled = {_plain(column): column for column in wanted}
    names = {
        column: spelled.get(_plain(column), column) for column in dict.fromkeys(c for _, row in numbered for c in row)
    }
    double = next((name for name in names.values() if list(names.values()).count(name) > 1), None)
    if double is not None:
        raise ProbeError(f"{path}: two columns are named {double!r}")
    for line, row in numbered:
        for column in (column for column, name in names.items() if name in texts):
            if not isinstance(row.get(column, ""), str):
                found = json.dumps(row[column])[:SHOWN]
                raise ProbeError(f"{path}, line {line}: {names[column]!r} is {found}; it must be a text")
    rows = tuple({name: _cell(row.get(column, "")) for column, name in names.items()} for _, row in numbered)
    return Table(path, tuple(names.values()), rows, tuple(line for line, _ in numbered))


def _delimited_rows(path: Path, text: str) -> Iterator[tuple[int, Row]]:
    header = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(SEPARATORS, key=header.count))
    try:
        columns = [cell.strip() for cell in next(reader, [])]
        if len(set(columns)) < len(columns):
            raise ProbeError(f"{path}: two columns are named {max(columns, key=columns.count)!r}")
        for cells in filter(None, reader):
            if len(cells) != len(columns):
                raise ProbeError(
                    f"{path}, line {reader.line_num}: {len(cells)} cells, but the header has {len(columns)}"
                )
            yield reader.line_num, {column: cell.strip() for column, cell in zip(columns, cells, strict=True)}
    except csv.Error as error:
        raise ProbeError(f"{path}, line {reader.line_num}: {error}; is a quote not closed?") from None


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers and objects, null left out of them."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:  # the latter where it is nested without end
            raise ProbeError(f"{path}, line {number}: not readable as JSON: {error}") from None
        if not isinstance(value, dict):
            raise ProbeError(f"{path}, line {number}: an object is needed, found {type(value).__name__}")
        for text in (*value, *value.values()):
            refuse_halves(text if isinstance(text, str) else "", f"{path}, line {number}", ProbeError)
        yield number, {key: "" if cell is None else cell for key, cell in value.items()}


def _cell(value: Any) -> str:
    """Return a cell as text; numbers and the like as JSON writes them."""
    return value if isinstance(value, str) else json.dumps(value)


def _plain(column: str) -> str:
    """Return a column's name without what people spell differently."""
    return re.sub(r"[\W_]+", "", column.casefold())

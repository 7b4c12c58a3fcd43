"""From a benchmark's files to minimal pairs."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lillama.corpus.paths import whole_text
from lillama.errors import ProbeError
from lillama.probing.benchmark import Benchmark, Stimuli
from lillama.probing.table import Row, Table, read_table


@dataclass(frozen=True)
class Pair:
    """A right text and a wrong one that differs in one thing.

    Attributes:
        good: the right text.
        bad: the wrong one.
        fields: column -> value of all that is known about them, the texts included.
    """

    good: str
    bad: str
    fields: Mapping[str, str]


def read_pairs(benchmark: Benchmark, folder: Path) -> tuple[Pair, ...]:
    """Read a benchmark's pairs for a model of text.

    Args:
        benchmark: whose `files` are looked for.
        folder: where they lie.

    Raises:
        ProbeError: no file or no pair, a missing column, an empty cell, or one name for two different pairs.
    """
    if not folder.is_dir():
        raise ProbeError(f"{folder}: no such folder; give the one that holds {' '.join(benchmark.files)} as --data")
    found = sorted({path for pattern in benchmark.files for path in folder.glob(pattern) if path.is_file()})
    if not found:
        raise ProbeError(f"{folder}: no file {' or '.join(benchmark.files)} here, which {benchmark.name} is made of")
    pairs = tuple(pair for path in found for pair in _pairs_of(benchmark, path))
    texts: dict[tuple[str, ...], tuple[str, str]] = {}
    for pair in pairs:
        name = pair_name(benchmark, pair.fields)
        if texts.setdefault(name, (pair.good, pair.bad)) != (pair.good, pair.bad):
            both = f"{texts[name][0]!r} and {pair.good!r}"
            raise ProbeError(f"{folder}: {', '.join(benchmark.pair)} = {', '.join(name)} names two pairs: {both}")
    return pairs


def pair_name(benchmark: Benchmark, fields: Mapping[str, str]) -> tuple[str, ...]:
    """Return what names a pair; an optional column that is not there counts as empty."""
    return tuple(fields.get(column, "") for column in benchmark.pair)


def without_optional(benchmark: Benchmark, columns: Sequence[str]) -> tuple[str, ...]:
    """Return those of some columns that a file must have."""
    return tuple(column for column in columns if column not in benchmark.optional)


def read_stimuli(benchmark: Benchmark, stimuli: Stimuli, path: Path) -> Table:
    """Read a table of single texts and check it; the text stands in the first of `stimuli.text`."""
    others = (*stimuli.pair, stimuli.correct)
    table = read_table(
        path, (*stimuli.text, *others, stimuli.voice, stimuli.filename, *benchmark.columns), stimuli.text
    )
    table.require(without_optional(benchmark, others))
    text = next((c for c in stimuli.text if c in table.columns and all(row[c].strip() for row in table.rows)), None)
    if text is None:
        table.require(stimuli.text[-1:])
        raise ProbeError(f"{path}: none of the columns {', '.join(stimuli.text)} is filled in every row")
    for line, row in zip(table.lines, table.rows, strict=True):
        if row[stimuli.correct] not in ("0", "1"):
            raise ProbeError(f"{path}, line {line}: {stimuli.correct!r} is {row[stimuli.correct]!r}; it must be 1 or 0")
    rows = tuple(row | {stimuli.text[0]: row[text]} for row in table.rows)
    return Table(path, table.columns, rows, table.lines)


def match_pairs(stimuli: Stimuli, path: Path, rows: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """Yield the places of right texts and of their wrong ones, in the order of the right texts.

    Several rows may share what names a pair: as many wrong ones as right ones match in order, one right text matches all.
    """
    key_columns = [column for column in (stimuli.voice, *stimuli.pair) if column in rows[0]]
    sides: dict[tuple[str, ...], tuple[list[int], list[int]]] = {}
    for place, row in enumerate(rows):
        good, bad = sides.setdefault(tuple(row[column] for column in key_columns), ([], []))
        (good if row[stimuli.correct] == "1" else bad).append(place)
    couples: list[tuple[int, int]] = []
    for key, (good, bad) in sides.items():
        if not bad or len(good) not in (1, len(bad)):
            named = ", ".join(f"{column} {value}" for column, value in zip(key_columns, key, strict=True))
            raise ProbeError(f"{path}: {named}: {len(good)} right and {len(bad)} wrong texts do not make pairs")
        couples += zip(good if len(good) > 1 else good * len(bad), bad, strict=True)
    yield from sorted(couples)


def couple(benchmark: Benchmark, stimuli: Stimuli, good: Row, bad: Row) -> Pair:
    """Return the pair of two rows; what else is known comes from the right text's row."""
    texts = {benchmark.good: good[stimuli.text[0]], benchmark.bad: bad[stimuli.text[0]]}
    single = (*stimuli.text, stimuli.correct, stimuli.filename)
    fields = {column: cell for column, cell in good.items() if column not in single}
    return Pair(texts[benchmark.good], texts[benchmark.bad], fields | texts)


def _pairs_of(benchmark: Benchmark, path: Path) -> Iterator[Pair]:
    if benchmark.stimuli is not None:
        return _couple(benchmark, benchmark.stimuli, path)
    named = _from_name(benchmark, path)
    return (Pair(row[benchmark.good], row[benchmark.bad], row) for row in _rows(benchmark, path, named))


def _couple(benchmark: Benchmark, stimuli: Stimuli, path: Path) -> Iterator[Pair]:
    """Yield the pairs of the first voice."""
    table = read_stimuli(benchmark, stimuli, path)
    voice = table.rows[0].get(stimuli.voice)
    rows = [row for row in table.rows if row.get(stimuli.voice) == voice]
    for good, bad in match_pairs(stimuli, path, rows):
        yield couple(benchmark, stimuli, rows[good], rows[bad])


def _rows(benchmark: Benchmark, path: Path, named: Row) -> Iterator[Row]:
    if path.suffix == ".txt":
        yield from (row | named for row in _lines(benchmark, path))
        return
    texts = (benchmark.good, benchmark.bad)
    table = read_table(path, (*texts, *benchmark.columns), texts)
    needed = (benchmark.good, benchmark.bad, *benchmark.columns)
    table.require(column for column in without_optional(benchmark, needed) if column not in named)
    yield from (row | named for row in table.rows)


def _lines(benchmark: Benchmark, path: Path) -> Iterator[Row]:
    text = whole_text(path, ProbeError)
    lines = text.removesuffix("\n").split("\n") if text else []
    empty = next((number for number, line in enumerate(lines, 1) if not line.strip()), None)
    if not lines or len(lines) % 2 or empty is not None:
        what = f"line {empty} is empty" if empty is not None else f"{len(lines)} lines"
        raise ProbeError(f"{path}: {what}; two lines make a pair")
    order = (benchmark.good, benchmark.bad) if benchmark.lines == "good first" else (benchmark.bad, benchmark.good)
    for place in range(0, len(lines), 2):
        yield {"id": str(place // 2 + 1)} | dict(
            zip(order, (lines[place].strip(), lines[place + 1].strip()), strict=True)
        )


def _from_name(benchmark: Benchmark, path: Path) -> Row:
    """Return the columns that a file's name holds."""
    found = re.fullmatch(benchmark.file_name, path.stem) if benchmark.file_name else None
    if benchmark.file_name and found is None:
        raise ProbeError(
            f"{path}: the name does not match {benchmark.file_name}, as file_name of {benchmark.name} asks"
        )
    return {"file": path.stem} | ({} if found is None else found.groupdict(""))

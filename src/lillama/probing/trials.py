"""Trials: pairs with the log-probabilities that some system gave to both texts."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lillama.corpus.paths import whole_text
from lillama.errors import ProbeError
from lillama.files.atomic import atomic_file
from lillama.probing.benchmark import Benchmark
from lillama.probing.pairs import Pair, couple, match_pairs, read_stimuli, without_optional
from lillama.probing.table import Row, read_table

SCORE = "score"


@dataclass(frozen=True)
class Trial:
    """One pair, judged.

    Attributes:
        pair: what was judged.
        good: what the system gave to the right text; larger is likelier.
        bad: what it gave to the wrong one.
        tie: the score where both are equal: 0.5, or what a table of rounded numbers recorded.
    """

    pair: Pair
    good: float
    bad: float
    tie: float = 0.5

    @property
    def score(self) -> float:
        """1 where the right text is likelier, 0 where the wrong one is.

        >>> Trial(Pair("a cat", "a cats", {}), -1.5, -2.5).score
        1.0
        """
        return self.tie if self.good == self.bad else float(self.good > self.bad)


def read_trials(path: Path, benchmark: Benchmark) -> tuple[Trial, ...]:
    """Read a table of trials, as BabySLM's scripts and `write_trials` write it.

    A `score` column settles trials whose two numbers are equal as printed: the table was rounded after it was scored.

    Raises:
        ProbeError: the table is empty, lacks a column, or holds something that is no finite number.
    """
    scores = (f"{SCORE} {benchmark.good}", f"{SCORE} {benchmark.bad}")
    needed = (benchmark.good, benchmark.bad, *scores, *benchmark.columns)
    table = read_table(path, (*needed, SCORE), (benchmark.good, benchmark.bad))
    table.require(without_optional(benchmark, needed))

    def trial(index: int, row: Row) -> Trial:
        good, bad = (table.number(index, column) for column in scores)
        recorded = table.number(index, SCORE) if good == bad and row.get(SCORE) else 0.5
        tie = recorded if recorded in (0.0, 1.0) else 0.5
        fields = {column: cell for column, cell in row.items() if column not in (*scores, SCORE)}
        return Trial(Pair(row[benchmark.good], row[benchmark.bad], fields), good, bad, tie)

    return tuple(trial(index, row) for index, row in enumerate(table.rows))


def write_trials(path: Path, benchmark: Benchmark, trials: Sequence[Trial]) -> None:
    """Write a table of trials, tab-separated where the name ends in .tsv; numbers are written in full."""
    texts = (benchmark.good, benchmark.bad)
    others = [c for c in dict.fromkeys(c for trial in trials for c in trial.pair.fields) if c not in texts]
    header = [*others, *(word for text in texts for word in (text, f"{SCORE} {text}")), SCORE]
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
        writer.writerow(header)
        for trial in trials:
            known = [trial.pair.fields.get(column, "") for column in others]
            writer.writerow([*known, trial.pair.good, trial.good, trial.pair.bad, trial.bad, trial.score])


def join_probabilities(probabilities: Path, gold: Path, benchmark: Benchmark) -> tuple[Trial, ...]:
    """Return trials from a file of names and probabilities and the benchmark's table of texts.

    A file that names the first voice's texts alone is that of a system that reads: the other voices are left out.

    Raises:
        ProbeError: the benchmark has no such table, or the two files do not name the same texts.
    """
    stimuli = benchmark.stimuli
    if stimuli is None:
        raise ProbeError(
            f"benchmark {benchmark.name} has no table of single texts: give --trials instead of probabilities"
        )
    table = read_stimuli(benchmark, stimuli, gold)
    table.require([stimuli.filename])
    given = list(_probabilities(probabilities))
    names = {name for name, _ in given}
    heard = [row for row in table.rows if row.get(stimuli.voice) == table.rows[0].get(stimuli.voice)]
    rows = heard if names <= {row[stimuli.filename] for row in heard} else list(table.rows)
    scores = _by_row(probabilities, gold, given, [row[stimuli.filename] for row in rows])
    couples = match_pairs(stimuli, gold, rows)
    return tuple(Trial(couple(benchmark, stimuli, rows[g], rows[b]), scores[g], scores[b]) for g, b in couples)


def _probabilities(path: Path) -> Iterator[tuple[str, float]]:
    lines = whole_text(path, ProbeError).split("\n")
    if not any(line.strip() for line in lines):
        raise ProbeError(f"{path}: no rows in this file")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        cells = line.split()
        try:
            value = float(cells[1])
        except (IndexError, ValueError):
            raise ProbeError(f"{path}, line {number}: a name and a number are needed, found {line.strip()!r}") from None
        if not abs(value) < float("inf"):
            raise ProbeError(f"{path}, line {number}: the probability of {cells[0]} is {cells[1]}; it must be finite")
        yield cells[0], value


def _by_row(path: Path, gold: Path, given: Sequence[tuple[str, float]], wanted: Sequence[str]) -> list[float]:
    """Return each row's probability: by place where both files name the same in the same order, else by name."""
    if [name for name, _ in given] == list(wanted):
        return [value for _, value in given]
    known = dict(given)
    ambiguous = next((name for name, value in given if known[name] != value), None)
    if ambiguous is not None:
        raise ProbeError(f"{path}: {ambiguous} has several probabilities, and the order is not that of {gold}")
    missing = [name for name in wanted if name not in known]
    unknown = sorted(known.keys() - set(wanted))
    for names, holder, other in ((missing, gold, path), (unknown, path, gold)):
        if names:
            raise ProbeError(f"{other}: {len(names)} texts of {holder} are not in it, the first is {names[0]}")
    return [known[name] for name in wanted]

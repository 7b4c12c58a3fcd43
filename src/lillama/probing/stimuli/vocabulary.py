"""Words and how often they occur, from a list with counts or from texts."""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lillama.corpus.paths import whole_text
from lillama.corpus.texts import read_text
from lillama.errors import ProbeError

WORD = re.compile(r"[^\W\d_]+(?:[-'’][^\W\d_]+)*")  # noqa: RUF001
CLITIC = re.compile(r"^(?:[cdjlmnst]|qu|jusqu|lorsqu|puisqu)['’]", re.IGNORECASE)  # noqa: RUF001
SEPARATORS = "\t;,"
RARE = 2e-6  # share of all words, below which one may be a slip of the pen


@dataclass(frozen=True)
class Vocabulary:
    """Words with their frequencies.

    Attributes:
        counts: how often each word occurs, in small letters.
        known: all that must not be taken for a pseudo-word: these words, and others such as names.
        source: where they come from.

    Examples:
        >>> vocabulary = count_words(["The cat saw Tom. The dog saw the cat."], "an example")
        >>> vocabulary.counts["cat"], vocabulary.counts["tom"], "tom" in vocabulary.known
        (2, 0, True)
    """

    counts: Mapping[str, int]
    known: frozenset[str]
    source: str

    def with_known(self, words: Iterable[str]) -> "Vocabulary":
        """Return the vocabulary with further words that are no pseudo-words."""
        return Vocabulary(self.counts, self.known | {word.strip().casefold() for word in words}, self.source)


def count_words(texts: Iterable[str], source: str) -> Vocabulary:
    """Count the words of texts; what is very rare, or written with a capital as names are, is known but not counted."""
    written = Counter(word for text in texts for word in _words(text))
    least = max(1, RARE * written.total())
    counts = Counter({word: number for word, number in written.items() if word.islower() and number >= least})
    return Vocabulary(counts, frozenset(word.casefold() for word in written), source)


def read_texts(paths: Sequence[Path]) -> Vocabulary:
    """Count the words of text files (.txt, .md, also .gz).

    Raises:
        DataError: a file is no text.
        ProbeError: there is no word in them.
    """
    vocabulary = count_words((read_text(path) for path in paths), ", ".join(path.name for path in paths))
    if not vocabulary.counts:
        raise ProbeError(f"{vocabulary.source}: holds no word in small letters; give other text")
    return vocabulary


def read_word_list(path: Path) -> Vocabulary:
    """Read a word list: one `word,count` in a line, with comma, tab or semicolon, with or without a header line.

    Raises:
        ProbeError: a line is not of this kind.
    """
    lines = _lines(path)
    delimiter = next((mark for mark in SEPARATORS if lines and mark in lines[0][1]), ",")
    counts: Counter[str] = Counter()
    for position, (number, line) in enumerate(lines):
        cells = [cell.strip() for cell in _cells(path, number, line, delimiter)]
        if position == 0 and len(cells) > 1 and not _is_count(cells[1]):
            continue
        if len(cells) < 2 or not cells[0] or not _is_count(cells[1]):
            raise ProbeError(f"{path}: line {number} is {line!r}; a line holds a word and its count, as `rabbit,12`")
        counts[cells[0].casefold()] += int(float(cells[1]))
    if not counts:
        raise ProbeError(f"{path}: holds no words; a line holds a word and its count, as `rabbit,12`")
    return Vocabulary(counts, frozenset(counts), path.name)


def read_known(path: Path) -> list[str]:
    """Read words that must not be taken for pseudo-words: the first cell of each line."""
    return [re.split(f"[{SEPARATORS}]", line)[0] for _, line in _lines(path)]


def _lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines that are not empty, with their numbers."""
    lines = whole_text(path, ProbeError).split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _words(text: str) -> Iterable[str]:
    for match in WORD.finditer(text):
        word = CLITIC.sub("", match[0])
        yield word.replace("’", "'")  # noqa: RUF001


def _cells(path: Path, number: int, line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter))
    except csv.Error as error:
        raise ProbeError(f"{path}: line {number}: {error}; a line holds a word and its count, as `rabbit,12`") from None


def _is_count(cell: str) -> bool:
    return re.fullmatch(r"\d{1,15}(\.\d+)?", cell) is not None  # more is no count

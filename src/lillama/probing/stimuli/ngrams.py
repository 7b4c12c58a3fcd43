"""n-gram models, the control: a good set of minimal pairs leaves them at chance."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

Segments = tuple[str, ...]
EDGE = ""  # stands before the first and behind the last segment
SMOOTHING = 0.1  # is added to every count


@dataclass(frozen=True)
class NGrams:
    """A model that predicts a segment (a letter, a phoneme, a word) from the `order - 1` before it, with additive smoothing.

    Attributes:
        order: 1, 2, ...
        counts: of n-grams.
        contexts: of what stands before the last segment of n-grams.
        kinds: number of different segments.

    Examples:
        >>> model = count_ngrams({("a", "b"): 3, ("b", "a"): 1}, order=2)
        >>> model.preference(("a", "b"), ("b", "a")) > 0
        True
    """

    order: int
    counts: Mapping[Segments, float]
    contexts: Mapping[Segments, float]
    kinds: int

    def log_probability(self, ngram: Segments) -> float:
        """Return the log-probability of the last segment of an n-gram after the others."""
        if ngram not in self._memory:
            seen = self.counts.get(ngram, 0) + SMOOTHING
            self._memory[ngram] = math.log(seen / (self.contexts.get(ngram[:-1], 0) + SMOOTHING * (self.kinds + 1)))
        return self._memory[ngram]

    @cached_property
    def _memory(self) -> dict[Segments, float]:
        """What has been computed before."""
        return {}

    def preference(self, first: Segments, second: Segments) -> float:
        """Return the log-probability of `first` less that of `second`; the sum is exact, what both hold cancels."""
        gains = (self.log_probability(ngram) for ngram in ngrams(first, self.order))
        losses = (-self.log_probability(ngram) for ngram in ngrams(second, self.order))
        return math.fsum(chain(gains, losses))

    def accuracy(self, pairs: Iterable[tuple[Segments, Segments]]) -> float:
        """Return the share of (right, wrong) pairs whose right one is more probable; ties count half."""
        values = [self.preference(right, wrong) for right, wrong in pairs]
        return math.fsum(1.0 if value > 0 else 0.5 if value == 0 else 0.0 for value in values) / len(values)


def count_ngrams(sequences: Mapping[Segments, float], order: int) -> NGrams:
    """Count the n-grams of sequences, each weighted by its frequency."""
    counts: Counter[Segments] = Counter()
    contexts: Counter[Segments] = Counter()
    for sequence, weight in sequences.items():
        for ngram in ngrams(sequence, order):
            counts[ngram] += weight  # type: ignore[assignment]
            contexts[ngram[:-1]] += weight  # type: ignore[assignment]
    return NGrams(order, counts, contexts, len({segment for sequence in sequences for segment in sequence}))


def ngrams(sequence: Sequence[str], order: int) -> list[Segments]:
    """Return the n-grams of a sequence; from pairs on, its edges count as segments.

    >>> ngrams(("a", "b"), 2)
    [('', 'a'), ('a', 'b'), ('b', '')]
    """
    edge = (EDGE,) * (order - 1)
    padded = (*edge, *sequence, *edge[:1])
    return [padded[start : start + order] for start in range(len(padded) - order + 1)]

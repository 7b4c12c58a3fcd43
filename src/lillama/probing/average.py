"""From trials to accuracies: the averaging that a benchmark's authors define, groups, and how sure the figures are."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from typing_extensions import TypedDict

from lillama.errors import ProbeError
from lillama.evaluation.intervals import Interval, IntervalJson, mean_interval
from lillama.files.artefacts import Count, Share
from lillama.probing.benchmark import Benchmark, Grouping
from lillama.probing.trials import Trial

LONGEST = 4000  # digits of what is ordered as a number; Python reads no more


class AccuracyJson(TypedDict):
    """A group of pairs, in JSON."""

    label: str
    items: Count
    score: Share | None
    std: float | None
    interval: IntervalJson | None
    dense: Share | None
    difference: float | None
    difference_interval: IntervalJson | None


@dataclass(frozen=True)
class Item:
    """What is averaged last: a pair, or a word with all its pseudo-words.

    Attributes:
        fields: column -> value, of the first trial that went into it.
        score: mean score of its trials.
    """

    fields: Mapping[str, str]
    score: float


@dataclass(frozen=True)
class Accuracy:
    """Share of pairs in which the right text was found likelier; chance is 0.5.

    Attributes:
        label: of the group.
        items: pairs or words that it is the mean of.
        score: the mean; None where there are no items.
        std: standard deviation of the items' scores (n - 1); None for fewer than two.
        interval: the mean with its 95 % bootstrap interval over items; None where there are no items.
        dense: the mean of the model that was compared with.
        difference: `score - dense`.
        difference_interval: the same with its 95 % interval, of pairs.
    """

    label: str
    items: int
    score: float | None
    std: float | None
    interval: Interval | None
    dense: float | None = None
    difference: float | None = None
    difference_interval: Interval | None = None

    def as_json(self) -> AccuracyJson:
        """Return the value for JSON."""
        interval, apart = self.interval, self.difference_interval
        return {
            "label": self.label,
            "items": self.items,
            "score": self.score,
            "std": self.std,
            "interval": None if interval is None else interval.as_json(),
            "dense": self.dense,
            "difference": self.difference,
            "difference_interval": None if apart is None else apart.as_json(),
        }


def average_groups(benchmark: Benchmark, trials: Sequence[Trial]) -> tuple[Item, ...]:
    """Return what a benchmark averages last, in the order of its names; numbers are ordered as numbers."""
    items = [Item(trial.pair.fields, trial.score) for trial in trials]
    for columns in benchmark.average:
        items = _means(items, columns)
    return tuple(items)


def overall(items: Sequence[Item], dense: Sequence[Item] | None, seed: int) -> Accuracy:
    """Return the accuracy over all items."""
    return _accuracy("overall", range(len(items)), items, dense, seed)


def breakdown(
    name: str, grouping: Grouping, items: Sequence[Item], dense: Sequence[Item] | None, seed: int
) -> tuple[Accuracy, ...]:
    """Return the accuracy of each group, in the order of its bands, or of its values.

    Args:
        name: of the breakdown, and of its column where it names none.
        grouping: its column and bands; a band without items stays, with no score.
        items: what falls into groups.
        dense: the same items, scored by another model.
        seed: of the resampling.

    Raises:
        ProbeError: a value that should fall into a band is no number, or lies below all bands.
    """
    column = grouping.column or name
    places: dict[str, list[int]] = {label: [] for label in grouping.labels}
    values = [item.fields[column] for item in items]
    labels = [_band(grouping, column, value) for value in values] if grouping.bands else values
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    ordered = places if grouping.bands else dict(sorted(places.items(), key=lambda entry: _order(entry[0])))
    return tuple(_accuracy(label, found, items, dense, seed) for label, found in ordered.items())


def _means(items: Sequence[Item], columns: Sequence[str]) -> list[Item]:
    """Replace items that are equal in some columns by their mean."""
    groups: dict[tuple[str, ...], list[Item]] = {}
    for item in items:
        groups.setdefault(tuple(item.fields.get(column, "") for column in columns), []).append(item)
    ordered = sorted(groups, key=lambda key: tuple(_order(value) for value in key))
    return [Item(groups[key][0].fields, float(np.mean([item.score for item in groups[key]]))) for key in ordered]


def _accuracy(
    label: str,
    places: Sequence[int],
    items: Sequence[Item],
    dense: Sequence[Item] | None,
    seed: int,
) -> Accuracy:
    if not places:
        return Accuracy(label, 0, None, None, None)
    scores = np.array([items[place].score for place in places])
    std = float(scores.std(ddof=1)) if len(scores) > 1 else None
    mean, interval = float(scores.mean()), mean_interval(scores, np.random.default_rng(seed))
    if dense is None:
        return Accuracy(label, len(scores), mean, std, interval)
    others = np.array([dense[place].score for place in places])
    difference = mean_interval(scores - others, np.random.default_rng(seed))
    other = float(others.mean())
    return Accuracy(label, len(scores), mean, std, interval, other, mean - other, difference)


def _band(grouping: Grouping, column: str, value: str) -> str:
    number = _number(value)
    if number is None:
        raise ProbeError(f"column {column!r} holds {value!r}; its groups are bands of numbers")
    place = bisect_right(grouping.bands, number) - 1
    if place < 0:
        raise ProbeError(
            f"column {column!r} holds {value}, below the first band, which begins at {grouping.bands[0]:g}"
        )
    return grouping.labels[place]


def _number(value: str) -> float | None:
    """Return the finite number that a text writes; None where it writes none."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _order(value: str) -> tuple[int, str]:
    """Return what sorts whole numbers as numbers, and all other words before them."""
    return (int(value), "") if value.isdecimal() and len(value) <= LONGEST else (-1, value)

"""What probing found, as a value and as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass

from typing_extensions import TypedDict

from lillama.evaluation.intervals import Interval, IntervalJson
from lillama.files.artefacts import Count, Share
from lillama.probing.average import Accuracy, AccuracyJson
from lillama.probing.benchmark import ScoreName, Unit
from lillama.probing.trials import Trial

VERSION = 2
CHANCE = 0.5


class AskedJson(TypedDict, total=False):
    """How a model was asked, in JSON; nothing where the trials were given."""

    model: str
    against: str
    score: ScoreName
    unit: Unit


class OverallJson(TypedDict):
    """The overall comparison with the dense model, in JSON."""

    dense: Share
    difference: float | None
    interval: IntervalJson | None


class ProbeJson(AskedJson):
    """What `lillama probe --json` prints about one benchmark."""

    version: int
    benchmark: str
    overall: Share
    interval: IntervalJson | None
    chance: Share
    groups: dict[str, float]
    pairs: int
    trials: int
    items: Count
    ties: int
    identical: int
    breakdowns: dict[str, list[AccuracyJson]]
    compared: OverallJson | None
    notes: list[str]


class ProbesJson(TypedDict):
    """What `lillama probe --json` prints about several benchmarks."""

    version: int
    results: list[ProbeJson]


@dataclass(frozen=True)
class Asked:
    """How a model was asked.

    Attributes:
        model: that was asked.
        against: the dense model that it was compared with; empty: none.
        score: how a log-probability became the score of a text.
        unit: what that counted.
    """

    model: str
    against: str
    score: ScoreName
    unit: Unit

    def as_json(self) -> AskedJson:
        """Return the value for JSON."""
        return {"model": self.model, "against": self.against, "score": self.score, "unit": self.unit}


@dataclass(frozen=True)
class ProbeResult:
    """What a model, or another system, scored on a benchmark.

    Attributes:
        benchmark: its name.
        asked: how the model was asked; None where the trials were given.
        total: accuracy over all.
        breakdowns: grouping -> accuracy of each of its groups.
        trials: every pair with its two scores.
        pairs: distinct pairs.
        ties: trials whose two texts are equally likely; each counts half.
        identical: trials whose two texts are the same to the model (the same tokens), or the same altogether.
        notes: what a reader should know, one line each.
    """

    benchmark: str
    asked: Asked | None
    total: Accuracy
    breakdowns: Mapping[str, tuple[Accuracy, ...]]
    trials: tuple[Trial, ...]
    pairs: int
    ties: int
    identical: int
    notes: tuple[str, ...]

    @property
    def overall(self) -> float:
        """Accuracy over all, as the benchmark averages."""
        return self.total.score or 0.0

    @property
    def interval(self) -> Interval | None:
        """`overall` with its 95 % bootstrap interval; None where there are no items."""
        return self.total.interval

    @property
    def groups(self) -> dict[str, float]:
        """Group -> accuracy, in the benchmark's main breakdown; empty groups are left out."""
        first = next(iter(self.breakdowns.values()), ())
        return {group.label: group.score for group in first if group.score is not None}

    def as_json(self) -> ProbeJson:
        """Return JSON values; the trials are left out, `write_trials` writes them."""
        asked: AskedJson = {} if self.asked is None else self.asked.as_json()
        return {
            "version": VERSION,
            "benchmark": self.benchmark,
            **asked,
            "overall": self.overall,
            "interval": None if self.interval is None else self.interval.as_json(),
            "chance": CHANCE,
            "groups": self.groups,
            "pairs": self.pairs,
            "trials": len(self.trials),
            "items": self.total.items,
            "ties": self.ties,
            "identical": self.identical,
            "breakdowns": {name: [group.as_json() for group in groups] for name, groups in self.breakdowns.items()},
            "compared": _compare(self.total),
            "notes": list(self.notes),
        }


def _compare(total: Accuracy) -> OverallJson | None:
    """Return the overall comparison with the dense model, if there was one."""
    if total.dense is None:
        return None
    interval = None if total.difference_interval is None else total.difference_interval.as_json()
    return {"dense": total.dense, "difference": total.difference, "interval": interval}

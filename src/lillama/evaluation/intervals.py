"""Confidence intervals by the bootstrap: what a value would be on other documents of the same kind.

Windows, prompts, documents or pairs are drawn with replacement, as many as there are, and the value is computed anew (Efron,
1979). Two models are compared on the same draws, so that what makes a document hard for both cancels (Koehn, EMNLP 2004,
W04-3250).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from pydantic import FiniteFloat
from torch import Tensor
from typing_extensions import TypedDict  # pydantic reads that of `typing` from Python 3.12 on

DRAWS = 10_000
LEVEL = 0.95
AT_ONCE = 1 << 22  # counts of documents in memory


class IntervalJson(TypedDict):
    """An interval in JSON."""

    value: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % confidence interval.

    Attributes:
        value: on all documents.
        low: lower bound; None where the interval cannot be told, as from a single document.
        high: upper bound.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, value: float, draws: Float[Tensor, " draws"] | None) -> "Interval":
        """Return a value with the percentiles of what the draws gave."""
        if draws is None:
            return cls(value)
        tail = (1 - LEVEL) / 2
        low, high = draws.quantile(torch.tensor([tail, 1 - tail], dtype=draws.dtype)).tolist()
        return cls(value, low, high)

    def as_json(self) -> IntervalJson:
        """Return the value for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Sums:
    """Totals of named columns over all documents, and over each draw of them.

    Attributes:
        total: name -> total; what follows the first dimension of a column is kept.
        draws: name -> totals of each draw; None where there is one document only.
    """

    total: Mapping[str, Float[Tensor, "..."]]
    draws: Mapping[str, Float[Tensor, "draws ..."]] | None

    def interval(self, statistic: Callable[[Mapping[str, Tensor]], Tensor]) -> Interval:
        """Return a statistic of the totals; it is computed for all draws at once, along the first dimension."""
        return Interval.of(statistic(self.total).item(), None if self.draws is None else statistic(self.draws))


def bootstrap(columns: Mapping[str, Float[Tensor, "documents ..."]], random: np.random.Generator) -> Sums:
    """Draw documents with replacement and total their columns.

    Args:
        columns: name -> one entry for each document, the same documents in every column.
        random: of the draws.

    Examples:
        >>> columns = {"right": torch.tensor([1.0, 0, 1, 1]), "all": torch.ones(4)}
        >>> share = bootstrap(columns, np.random.default_rng(0)).interval(lambda s: s["right"] / s["all"])
        >>> share.value, share.low <= 0.75 <= share.high
        (0.75, True)
    """
    total = {name: column.sum(0) for name, column in columns.items()}
    documents = len(next(iter(columns.values())))
    if documents < 2:
        return Sums(total, None)
    flat = torch.cat([column.reshape(documents, -1).double() for column in columns.values()], dim=1)
    drawn = torch.cat([times @ flat for times in _times(documents, random)])
    sizes = [column[0].numel() for column in columns.values()]
    parts = zip(columns.items(), drawn.split(sizes, dim=1), strict=True)
    return Sums(total, {name: part.reshape(DRAWS, *column.shape[1:]) for (name, column), part in parts})


def mean_interval(values: Float[np.ndarray, " documents"], random: np.random.Generator) -> Interval:
    """Return the mean of some values and its interval; their order does not matter.

    Examples:
        >>> mean_interval(np.ones(5), np.random.default_rng(0))
        Interval(value=1.0, low=1.0, high=1.0)
    """
    columns = {"sum": torch.from_numpy(np.sort(values)), "count": torch.ones(len(values), dtype=torch.float64)}
    return bootstrap(columns, random).interval(lambda sums: sums["sum"] / sums["count"])


def _times(documents: int, random: np.random.Generator) -> Iterator[Float[Tensor, "some documents"]]:
    """Yield how often each document is drawn, for some draws at a time; what is measured of them does not matter."""
    step = max(1, AT_ONCE // documents)
    for start in range(0, DRAWS, step):
        some = min(step, DRAWS - start)
        drawn = random.integers(documents, size=(some, documents)) + documents * np.arange(some)[:, None]
        times = np.bincount(drawn.ravel(), minlength=some * documents).reshape(some, documents)
        yield torch.from_numpy(times).double()

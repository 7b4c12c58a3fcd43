"""Confidence intervals by the bootstrap: what a value would be on other documents of the same kind.

Windows, prompts or documents are drawn with replacement, as many as there are, and the value is computed anew. Two models are
compared on the same draws, so that what makes a document hard for both cancels (Koehn, EMNLP 2004, W04-3250).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

DRAWS = 1000
LEVEL = 0.95


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

    def as_json(self) -> dict[str, float | None]:
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


def bootstrap(columns: Mapping[str, Float[Tensor, "documents ..."]], generator: torch.Generator) -> Sums:
    """Draw documents with replacement and total their columns.

    Args:
        columns: name -> one entry for each document, the same documents in every column.
        generator: of the draws.

    Examples:
        >>> columns = {"right": torch.tensor([1.0, 0, 1, 1]), "all": torch.ones(4)}
        >>> share = bootstrap(columns, torch.Generator().manual_seed(0)).interval(lambda s: s["right"] / s["all"])
        >>> share.value, share.low <= 0.75 <= share.high
        (0.75, True)
    """
    total = {name: column.sum(0) for name, column in columns.items()}
    documents = len(next(iter(columns.values())))
    if documents < 2:
        return Sums(total, None)
    flat = torch.cat([column.reshape(documents, -1).double() for column in columns.values()], dim=1)
    drawn = torch.stack([_times(documents, generator) @ flat for _ in range(DRAWS)])
    sizes = [column[0].numel() for column in columns.values()]
    parts = zip(columns.items(), drawn.split(sizes, dim=1), strict=True)
    return Sums(total, {name: part.reshape(DRAWS, *column.shape[1:]) for (name, column), part in parts})


def _times(documents: int, generator: torch.Generator) -> Float[Tensor, " documents"]:
    """Return how often each document is drawn."""
    drawn = torch.randint(documents, (documents,), generator=generator)
    return torch.bincount(drawn, minlength=documents).double()

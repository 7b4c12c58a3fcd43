"""Which calibration sequences are trained on, in which batches, and which are held out."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Which calibration sequences are trained on, and which are held out.

    Attributes:
        train: indices of the sequences that are trained on.
        held_out: indices of those on which states are compared.
    """

    train: Int[Tensor, " n"]
    held_out: Int[Tensor, " m"]

    @classmethod
    def of(cls, total: int, share: float, seed: int) -> "Split":
        """Hold out a random share of `total` sequences, at least one and not all; a single sequence serves for both."""
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        if total == 1:
            return cls(order, order)
        count = min(max(1, round(share * total)), total - 1)
        return cls(order[count:].sort().values, order[:count].sort().values)

    def part(self, sequences: int) -> Int[Tensor, " k"]:
        """Return the indices of so many sequences, in order, as large a part of them held out as of all, and one at least."""
        total = len(torch.cat([self.train, self.held_out]).unique())
        held = max(1, round(len(self.held_out) * sequences / total))
        return torch.cat([self.train[: max(1, sequences - held)], self.held_out[:held]]).unique()

    def within(self, rows: Int[Tensor, " k"]) -> "Split":
        """Return the split of some of the sequences, as indices into `rows`."""
        return Split(*(torch.isin(rows, one).nonzero().flatten() for one in (self.train, self.held_out)))


@dataclass(frozen=True)
class Batches:
    """The training sequences of every optimiser step, in several passes, each shuffled anew.

    Attributes:
        train: indices of the sequences.
        epochs: passes over them.
        size: sequences in a batch; the last one of a pass may be smaller.
        seed: of their order.
        steps: batches in all, at most those of all passes; None takes all.

    Examples:
        >>> batches = Batches(torch.arange(5), epochs=2, size=3, seed=0)
        >>> len(batches), [len(batch) for batch in batches]
        (4, [3, 2, 3, 2])
    """

    train: Int[Tensor, " n"]
    epochs: int
    size: int
    seed: int
    steps: int | None = None

    @classmethod
    def of_steps(cls, train: Int[Tensor, " n"], steps: int, size: int, seed: int) -> "Batches":
        """Return so many batches, in as many passes as they need."""
        return cls(train, math.ceil(steps / math.ceil(len(train) / size)), size, seed, steps)

    def __len__(self) -> int:
        most = self.epochs * math.ceil(len(self.train) / self.size)
        return most if self.steps is None else min(self.steps, most)

    def __iter__(self) -> Iterator[Int[Tensor, " batch"]]:
        return islice(self._passes(), len(self))

    def _passes(self) -> Iterator[Int[Tensor, " batch"]]:
        for epoch in range(self.epochs):
            order = torch.randperm(
                len(self.train), generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            )
            yield from self.train[order].split(self.size)

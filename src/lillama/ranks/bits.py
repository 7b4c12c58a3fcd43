"""Bits in the place of ranks: every linear stays dense, and takes as many bits as its numbers are worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Float64, Int64
from pydantic import Field, with_config

from lillama.errors import BudgetError, RecipeError
from lillama.lowrank.storage import BITS, Bits, Storage
from lillama.model.spec import LinearSpec, ModelSpec
from lillama.ranks.plan import PLAIN, RankPlan, Scope
from lillama.ranks.spectra import Spectra

BISECTIONS = 100  # of the price of a byte, on a logarithmic scale


@with_config(extra="forbid")
@dataclass(frozen=True)
class MixedBits:
    """Store every linear dense, each in the bits that minimise the predicted rise of the loss within some bytes.

    The choice minimises `rise + price * bytes`, linear by linear, with the price at which the bytes are met (Lagrange); what
    is left over goes where it saves most. The rise is that of `Spectra.rounding`: what rounding with feedback (GPTQ) really
    does to the weight, between the second moments at both of its sides.

    Attributes:
        widths: bits that a linear may have; the original's own type is always one more choice.
    """

    name: Literal["mixed-bits"] = "mixed-bits"
    widths: Annotated[tuple[Bits, ...], Field(min_length=1)] = BITS
    needs_spectra: ClassVar[bool] = True

    def __call__(
        self,
        spec: ModelSpec,
        keep: float,
        scope: Scope = "model",
        storage: Storage = PLAIN,
        spectra: Spectra | None = None,
        nbytes: int | None = None,
    ) -> RankPlan:
        """Return the plan of at most so many bytes; without spectra that of one width for all that fits.

        Args:
            spec: of the model.
            keep: has no say here: all numbers are kept.
            scope: of `keep`.
            storage: how many neighbours share a scale.
            spectra: of its linears, with their `rounding`.
            nbytes: bytes that the whole model may take.

        Raises:
            RecipeError: no bytes are given.
            BudgetError: the smallest plan of this kind is too large.
        """
        if nbytes is None:
            raise RecipeError("ranks.name is mixed-bits: bits are chosen for a size in bytes; give one (--bytes)")
        choices = _Choices.of(spec, storage, tuple(sorted(set(self.widths))), spectra)
        most = nbytes - spec.nbytes + sum(linear.params * spec.itemsize(linear) for linear in spec.linears)
        if int(choices.costs[:, 0].sum()) > most:
            smallest = choices.plan(np.zeros(len(spec.linears), dtype=np.int64)).kept_bytes
            raise BudgetError(
                f"bytes {nbytes:,} are not reachable: with {choices.widths[0]} bits in every linear the model takes "
                f"{smallest:,}; allow more, or take out numbers as well (--recipe default --bits 4)"
            )
        return choices.plan(choices.even(most) if spectra is None else choices.best(most))


@dataclass(frozen=True)
class _Choices:
    """What all linears may choose, what it costs and loses; the last choice is the original's own type.

    Attributes:
        spec: of the model.
        storage: of the plan.
        widths: bits, from few to many.
        costs: bytes.
        rises: nats a token.
        possible: which choices a linear has.
    """

    spec: ModelSpec
    storage: Storage
    widths: tuple[Bits, ...]
    costs: Int64[np.ndarray, "linears choices"]
    rises: Float64[np.ndarray, "linears choices"]

    @classmethod
    def of(cls, spec: ModelSpec, storage: Storage, widths: tuple[Bits, ...], spectra: Spectra | None) -> "_Choices":
        costs = np.array([_costs(linear, spec.itemsize(linear), storage, widths) for linear in spec.linears])
        rises = np.zeros(costs.shape)
        if spectra is not None:
            places = [BITS.index(bits) for bits in widths]
            rises[:, :-1] = np.array([spectra.rounding[linear.name][places] for linear in spec.linears])
        return cls(spec, storage, widths, costs, rises)

    def plan(self, chosen: Int64[np.ndarray, " linears"]) -> RankPlan:
        """Return the plan of a choice for each linear."""
        bits: dict[str, int] = {
            linear.name: self.widths[place]
            for linear, place in zip(self.spec.linears, chosen.tolist(), strict=True)
            if place < len(self.widths)
        }
        return RankPlan(self.spec, dict.fromkeys(one.name for one in self.spec.linears), self.storage, bits=bits)

    def even(self, most: int) -> Int64[np.ndarray, " linears"]:
        """Return the widest choice that all linears may have."""
        place = max(place for place in range(self.costs.shape[1]) if not place or self.costs[:, place].sum() <= most)
        return np.full(len(self.costs), place)

    def best(self, most: int) -> Int64[np.ndarray, " linears"]:
        """Return the choice of the least rise that the bytes allow."""
        low, high = -80.0, 20.0  # logarithms of nats a byte
        chosen = np.zeros(len(self.costs), dtype=np.int64)
        for _ in range(BISECTIONS):
            price = (low + high) / 2
            trial = np.argmin(self.rises + np.exp(price) * self.costs, axis=1)
            if self._cost(trial) <= most:
                high, chosen = price, trial
            else:
                low = price
        return self._spend(chosen, most - self._cost(chosen))

    def _cost(self, chosen: Int64[np.ndarray, " linears"]) -> int:
        return int(self.costs[np.arange(len(chosen)), chosen].sum())

    def _spend(self, chosen: Int64[np.ndarray, " linears"], spare: int) -> Int64[np.ndarray, " linears"]:
        """Give what is left to the steps that save most for a byte."""
        chosen, heap = (
            chosen.copy(),
            [step for row in range(len(chosen)) for step in self._steps(row, int(chosen[row]))],
        )
        heapify(heap)
        while heap:
            _, row, start, place, cost = heappop(heap)
            if chosen[row] != start or cost > spare:
                continue
            chosen[row], spare = place, spare - cost
            for step in self._steps(row, place):
                heappush(heap, step)
        return chosen

    def _steps(self, row: int, start: int) -> Sequence[tuple[float, int, int, int, int]]:
        """Return the ways to more bits of a linear: minus what a byte saves, the linear, old and new choice, bytes."""
        costs, rises = self.costs[row], self.rises[row]
        found = list[tuple[float, int, int, int, int]]()
        for place in range(start + 1, len(costs)):
            cost, saved = int(costs[place] - costs[start]), float(rises[start] - rises[place])
            if cost > 0 and saved > 0:
                found.append((-saved / cost, row, start, place, cost))
        return found


def _costs(linear: LinearSpec, itemsize: int, storage: Storage, widths: Sequence[Bits]) -> list[int]:
    """Return the bytes of a linear in each width, and in its own type."""
    shape = linear.out_features, linear.in_features
    storages = [Storage(storage.form, bits, storage.group_size) for bits in (*widths, None)]
    return [one.nbytes(*shape, None, itemsize) for one in storages]

"""Ranks by what they are worth: the budget goes where the whitened spectra say that it saves most loss."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import NDArray
from pydantic import Field, with_config

from lillama.lowrank.storage import Storage
from lillama.model.spec import FfnSpec, LinearSpec, ModelSpec
from lillama.ranks.allocators import Published, Ranks, Uniform, shape_of, worthwhile
from lillama.ranks.bits import MixedBits
from lillama.ranks.budget import Budget
from lillama.ranks.greedy import fit_ranks, spend_budget
from lillama.ranks.plan import PLAIN, RankPlan, Scope, Shape
from lillama.ranks.spectra import Spectra
from lillama.ranks.widths import WidthCurve

LEAST_PRICE = 1e-24  # of a number or byte that is considered, as a share of the highest


@with_config(extra="forbid")
@dataclass(frozen=True)
class Shift:
    """Move rank budget from some linears of a block to others of it, as D-Rank does (arXiv 2509.25622).

    Attributes:
        share: of the numbers of the first that goes to the second; 0 moves nothing.
        take: globs of the linears that give, by name within the block.
        give: globs of the linears that receive.
    """

    share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    take: tuple[str, ...] = ("*q_proj", "*k_proj", "*query", "*key")
    give: tuple[str, ...] = ("*v_proj", "*value")


@with_config(extra="forbid")
@dataclass(frozen=True)
class Adaptive:
    """Choose the ranks that minimise the predicted rise of the loss within the budget.

    Every linear may have any multiple of `multiple_of` as its rank, or stay dense. The choice minimises
    `rise + price * stored numbers`, linear by linear, with the price at which the budget is met (Lagrange); what is left
    over goes where it saves most. Where that is better, all linears of an FFN stay dense and its width is chosen instead.

    Attributes:
        multiple_of: every rank is a multiple of this; halved for what is left over where the model is so small that the
            budget would be missed by more than 0.5 %.
        floor: no rank is below this share of the one that `uniform` gives.
        mix: shares of the way from `uniform` to these ranks that are tried on held-out calibration tokens, `uniform`
            itself always among them; the best one is taken.
        shift: budget moved between linears of one block, on top.
        narrow: whether FFNs may be made narrower; such a plan is one more that is tried.
    """

    name: Literal["adaptive"] = "adaptive"
    multiple_of: Annotated[int, Field(ge=1)] = 8
    floor: Annotated[float, Field(ge=0, le=1)] = 0.25
    mix: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0, 0.5)
    shift: Shift = Shift()
    narrow: bool = True
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
        """Return the plan that keeps at most `keep` of the model or of its blocks; without spectra that of `uniform`.

        Args:
            spec: of the model.
            keep: share of its numbers, or of its blocks' numbers, that are stored.
            scope: what `keep` is a share of.
            storage: form in which factorised weights are stored.
            spectra: of its linears.
            nbytes: bytes that the whole model may take; it decides the size in the place of `keep`.

        Raises:
            BudgetError: no rank plan of this kind is small enough.
        """
        even = Uniform(multiple_of=self.multiple_of)(spec, keep, scope, storage)
        if spectra is None or (keep == 1 and nbytes is None):
            return even
        budget = Budget.of(spec, keep, scope, storage, nbytes)
        choices = self._choices(even, spectra, budget)
        budget.refuse(_at(math.inf, choices, budget), keep, scope)
        plan = spend_budget(_price(choices, budget), spectra, budget, self.multiple_of)
        if nbytes is None and spectra.rise(even) < spectra.rise(plan):  # where steps of rank are coarse for the budget
            plan = even
        return fit_ranks(_shift(plan, self.shift), spectra, budget, self.multiple_of)

    def candidates(
        self,
        spec: ModelSpec,
        keep: float,
        scope: Scope,
        storage: Storage,
        spectra: Spectra,
        nbytes: int | None = None,
    ) -> list[tuple[float, RankPlan]]:
        """Return shares of the way from `uniform` with their plans, of which the best is to be found by measuring.

        Where narrower FFNs are predicted to lose less, the plan that has them comes last.
        """
        budget = Budget.of(spec, keep, scope, storage, nbytes)
        ranks = replace(self, narrow=False)
        even, best = self(spec, keep, scope, storage), ranks(spec, keep, scope, storage, spectra, nbytes)
        even = fit_ranks(even, spectra, budget, self.multiple_of) if nbytes is not None else even
        mixed = {share: _between(even, best, share, self.multiple_of) for share in self.mix if share < 1}
        between = [(share, fit_ranks(plan, spectra, budget, self.multiple_of)) for share, plan in mixed.items()]
        found = [(0.0, even), *between, *([(1.0, best)] if 1.0 in self.mix else [])]
        if not self.narrow:
            return found
        narrow = self(spec, keep, scope, storage, spectra, nbytes)
        return [*found, (1.0, narrow)] if narrow.widths else found

    def _choices(self, even: RankPlan, spectra: Spectra, budget: Budget) -> "_AllChoices":
        """Return what all linears may choose; those of one shape and one uniform rank choose from the same."""
        alike = defaultdict[tuple[Shape, int | None], list[LinearSpec]](list)
        for linear, rank in even:
            alike[shape_of(linear), rank].append(linear)
        linears = [
            _Choices.of(linears, self.floor * (rank or min(shape)), self.multiple_of, spectra, budget)
            for (shape, rank), linears in alike.items()
        ]
        named = {linear.name: linear for linear in budget.spec.linears}
        narrow = [
            _Widths.of(ffn, [named[name] for name in ffn.linears], spectra.widths[ffn.outward], budget)
            for ffn in budget.spec.ffns
            if self.narrow and ffn.outward in spectra.widths
        ]
        return _AllChoices(linears, narrow)


Allocator = Published | Adaptive | MixedBits


@dataclass(frozen=True)
class _Choices:
    """The ranks that some linears of one shape may have, what they cost, and what they lose; the last one is dense."""

    names: tuple[str, ...]
    ranks: tuple[int | None, ...]
    costs: Int64[np.ndarray, " ranks"]
    rises: Float64[np.ndarray, "linears ranks"]

    @classmethod
    def of(cls, linears: Sequence[LinearSpec], least: float, step: int, spectra: Spectra, budget: Budget) -> "_Choices":
        one = linears[0]
        full, first = min(shape_of(one)), max(1, math.ceil(least / step)) * step
        ranks = [rank for rank in range(first, full + 1, step) if budget.useful(one, rank)]
        costs, rises = [budget.cost(one, rank) for rank in (*ranks, None)], np.zeros((len(linears), len(ranks) + 1))
        for row, linear in zip(rises, linears, strict=True):
            row[:-1] = spectra.rises(linear.name)[ranks]
        return cls(tuple(linear.name for linear in linears), (*ranks, None), np.array(costs), rises)

    def at(self, price: float) -> NDArray[np.intp]:
        """Return the place of each linear's best rank where a unit of cost is worth `price` nats."""
        if math.isinf(price):
            return np.full(len(self.names), np.argmin(self.costs))
        return np.argmin(self.rises + price * self.costs, axis=1)

    def best(self, price: float) -> Iterator[tuple[str, tuple[int | None, float, int]]]:
        """Yield each linear with its best rank, what it loses and what it costs."""
        for row, (name, place) in enumerate(zip(self.names, self.at(price).tolist(), strict=True)):
            yield name, (self.ranks[place], float(self.rises[row, place]), int(self.costs[place]))


@dataclass(frozen=True)
class _Widths:
    """The widths that an FFN may have, what its linears cost together, and what they lose; the first one is whole."""

    ffn: FfnSpec
    widths: Int64[np.ndarray, " widths"]
    costs: Int64[np.ndarray, " widths"]
    rises: Float64[np.ndarray, " widths"]

    @classmethod
    def of(cls, ffn: FfnSpec, linears: Sequence[LinearSpec], curve: WidthCurve, budget: Budget) -> "_Widths":
        def cost(width: int) -> int:
            shapes = [(width, linear.in_features) for linear in linears[:-1]] + [(linears[-1].out_features, width)]
            return sum(budget.cost(linear, None, shape) for linear, shape in zip(linears, shapes, strict=True))

        return cls(ffn, curve.widths, np.array([cost(int(width)) for width in curve.widths]), curve.rises)

    def best(self, price: float) -> tuple[int, float, int]:
        """Return the best width, what it loses and what it costs."""
        place = int(np.argmin(self.costs if math.isinf(price) else self.rises + price * self.costs))
        return int(self.widths[place]), float(self.rises[place]), int(self.costs[place])


@dataclass(frozen=True)
class _AllChoices:
    """What all linears and FFNs may choose."""

    linears: Sequence[_Choices]
    ffns: Sequence[_Widths]

    def at(self, price: float) -> tuple[Ranks, dict[str, int], int]:
        """Return the best ranks and widths where a unit of cost is worth `price` nats, and what they cost."""
        found = {name: best for some in self.linears for name, best in some.best(price)}
        ranks: Ranks = {name: rank for name, (rank, _, _) in found.items()}
        widths, total = dict[str, int](), sum(cost for _, _, cost in found.values())
        for one in self.ffns:
            own = [found[name] for name in one.ffn.linears]
            rise, cost = sum(loss for _, loss, _ in own), sum(cost for _, _, cost in own)
            width, narrow_rise, narrow_cost = one.best(price)
            better = narrow_rise + price * narrow_cost < rise + price * cost
            if width < one.ffn.neurons and (narrow_cost < cost if math.isinf(price) else better):
                ranks |= dict.fromkeys(one.ffn.linears)
                widths[one.ffn.outward] = width
                total += narrow_cost - cost
        return ranks, widths, total

    @property
    def most(self) -> float:
        """The largest loss that any choice may bring."""
        return max(float(some.rises.max()) for some in (*self.linears, *self.ffns))


def _at(price: float, choices: _AllChoices, budget: Budget) -> RankPlan:
    """Return the plan of the best choices."""
    ranks, widths, _ = choices.at(price)
    return RankPlan(budget.spec, ranks, budget.storage, widths)


def _price(choices: _AllChoices, budget: Budget) -> RankPlan:
    """Return the plan at the lowest price at which the budget is met."""
    high = choices.most + 1e-30
    low, best = high * LEAST_PRICE, math.inf
    while low < (price := math.sqrt(low * high)) < high:
        if choices.at(price)[2] <= budget.for_linears:
            high = best = price
        else:
            low = price
    return _at(best, choices, budget)


def _between(even: RankPlan, best: RankPlan, share: float, step: int) -> RankPlan:
    """Return the plan whose linears store what lies between two plans, `share` of the way from the first."""

    @cache
    def between(shape: Shape, first: int | None, second: int | None) -> int | None:
        numbers = round(
            (1 - share) * even.storage.numbers(*shape, first) + share * even.storage.numbers(*shape, second)
        )
        return _rank_for(shape, numbers, step, even.storage)

    ranks = {linear.name: between(shape_of(linear), rank, best[linear.name]) for linear, rank in even}
    return RankPlan(even.spec, ranks, even.storage)


def _rank_for(shape: Shape, numbers: int, step: int, storage: Storage) -> int | None:
    rank = storage.largest_rank(*shape, numbers) // step * step
    return None if numbers >= storage.numbers(*shape, None) else worthwhile(shape, max(step, rank), storage)


def _shift(plan: RankPlan, shift: Shift) -> RankPlan:
    """Return the plan with budget moved between the linears of each block."""
    if not shift.share:
        return plan
    ranks = dict(plan.ranks)
    for block in plan.spec.blocks:
        inner = {
            linear.name.removeprefix(f"{block.name}."): linear
            for linear in block.linears
            if linear.name not in plan.shapes
        }
        givers = [linear for name, linear in inner.items() if any(fnmatch(name, glob) for glob in shift.take)]
        takers = [linear for name, linear in inner.items() if any(fnmatch(name, glob) for glob in shift.give)]
        if not givers or not takers:
            continue
        moved = sum(shift.share * plan.numbers(linear) for linear in givers) / len(takers)
        for linear in givers:
            numbers = int((1 - shift.share) * plan.numbers(linear))
            ranks[linear.name] = _rank_for(shape_of(linear), numbers, 1, plan.storage)
        for linear in takers:
            ranks[linear.name] = _rank_for(shape_of(linear), int(plan.numbers(linear) + moved), 1, plan.storage)
    return replace(plan, ranks=ranks)

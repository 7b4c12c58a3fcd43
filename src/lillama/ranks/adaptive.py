"""Ranks by what they are worth: the budget goes where the whitened spectra say that it saves most loss."""

import math
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, with_config

from lillama.errors import BudgetError
from lillama.lowrank.storage import Storage
from lillama.model.spec import LinearSpec, ModelSpec
from lillama.ranks.allocate import Published, Uniform, checked_budget, refuse_unreachable, tolerance, worthwhile
from lillama.ranks.plan import PLAIN, RankPlan, Scope
from lillama.ranks.spectra import Spectra

HALVINGS = 100  # of the interval in which the price of a number is looked for


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
    over goes where it saves most.

    Attributes:
        multiple_of: every rank is a multiple of this; halved for what is left over where the model is so small that the
            budget would be missed by more than 0.5 %.
        floor: no rank is below this share of the one that `uniform` gives.
        mix: shares of the way from `uniform` to these ranks that are tried on held-out calibration tokens, `uniform`
            itself always among them; the best one is taken.
        shift: budget moved between linears of one block, on top.
    """

    name: Literal["adaptive"] = "adaptive"
    multiple_of: Annotated[int, Field(ge=1)] = 8
    floor: Annotated[float, Field(ge=0, le=1)] = 0.25
    mix: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0, 0.5)
    shift: Shift = Shift()
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
        budget = _Budget.of(spec, keep, scope, storage, nbytes)
        choices = {linear.name: self._choices(linear, even, spectra, budget) for linear in spec.linears}
        smallest = RankPlan(spec, {name: choice.at(math.inf) for name, choice in choices.items()}, storage)
        budget.refuse(smallest, keep, scope)
        plan = _spent(_priced(choices, budget), spectra, budget, self.multiple_of)
        return _fitted(_shifted(plan, self.shift), spectra, budget, self.multiple_of)

    def candidates(
        self,
        spec: ModelSpec,
        keep: float,
        scope: Scope,
        storage: Storage,
        spectra: Spectra,
        nbytes: int | None = None,
    ) -> dict[float, RankPlan]:
        """Return share of the way from `uniform` -> plan, of which the best is to be found by measuring."""
        budget = _Budget.of(spec, keep, scope, storage, nbytes)
        even, best = self(spec, keep, scope, storage), self(spec, keep, scope, storage, spectra, nbytes)
        even = _fitted(even, spectra, budget, self.multiple_of) if nbytes is not None else even
        mixed = {share: _between(even, best, share, self.multiple_of) for share in self.mix if share < 1}
        fitted = {share: _fitted(plan, spectra, budget, self.multiple_of) for share, plan in mixed.items()}
        return {0.0: even} | fitted | ({1.0: best} if 1.0 in self.mix else {})

    def _choices(self, linear: LinearSpec, even: RankPlan, spectra: Spectra, budget: "_Budget") -> "_Choices":
        least = self.floor * (even[linear.name] or min(linear.out_features, linear.in_features))
        return _Choices.of(linear, least, self.multiple_of, spectra, budget)


Allocator = Published | Adaptive


@dataclass(frozen=True)
class _Budget:
    """What a plan may store, in numbers or in bytes."""

    spec: ModelSpec
    storage: Storage
    most: int
    slack: float
    in_bytes: bool

    @classmethod
    def of(cls, spec: ModelSpec, keep: float, scope: Scope, storage: Storage, nbytes: int | None) -> "_Budget":
        if nbytes is None:
            return cls(spec, storage, checked_budget(spec, keep, scope), tolerance(spec, scope), False)
        return cls(spec, storage, nbytes, tolerance(spec, "model") * spec.bytes_per_param, True)

    def cost(self, linear: LinearSpec, rank: int | None) -> int:
        """Return what a linear costs at a rank."""
        shape = linear.out_features, linear.in_features
        if self.in_bytes:
            return self.storage.nbytes(*shape, rank, self.spec.bytes_per_param)
        return self.storage.numbers(*shape, rank)

    def useful(self, linear: LinearSpec, rank: int) -> int | None:
        """Return a rank, or None (dense) where it would not cost less than the dense weight."""
        possible = rank <= min(linear.out_features, linear.in_features)
        return rank if possible and self.cost(linear, rank) < self.cost(linear, None) else None

    def spare(self, plan: RankPlan) -> int:
        """Return what is left; negative where the plan is too large."""
        return self.most - (plan.kept_bytes if self.in_bytes else plan.kept_params)

    def refuse(self, smallest: RankPlan, keep: float, scope: Scope) -> None:
        """Raise `BudgetError` if even the smallest plan is too large."""
        if not self.in_bytes:
            refuse_unreachable(smallest, self.most, keep, scope)
        elif self.spare(smallest) < 0:
            raise BudgetError(
                f"bytes {self.most:,} are not reachable: the smallest model of this kind takes {smallest.kept_bytes:,}; "
                "allow more, lower ranks.floor, or store fewer bits (storage.bits)"
            )


@dataclass(frozen=True)
class _Choices:
    """The ranks that a linear may have, what they cost, and what they lose; the last one is dense."""

    ranks: tuple[int | None, ...]
    costs: NDArray[np.float64]
    rises: NDArray[np.float64]

    @classmethod
    def of(cls, linear: LinearSpec, least: float, step: int, spectra: Spectra, budget: _Budget) -> "_Choices":
        full, first = min(linear.out_features, linear.in_features), max(1, math.ceil(least / step)) * step
        ranks = [rank for rank in range(first, full + 1, step) if budget.useful(linear, rank)]
        costs = [budget.cost(linear, rank) for rank in (*ranks, None)]
        rises = [*spectra.rises(linear.name)[ranks], 0.0]
        return cls((*ranks, None), np.array(costs, dtype=np.float64), np.array(rises))

    def at(self, price: float) -> int | None:
        """Return the best rank where a unit of cost is worth `price` nats."""
        if math.isinf(price):
            return self.ranks[int(np.argmin(self.costs))]
        return self.ranks[int(np.argmin(self.rises + price * self.costs))]


def _priced(choices: dict[str, _Choices], budget: _Budget) -> RankPlan:
    """Return the plan at the lowest price at which the budget is met."""

    def at(price: float) -> RankPlan:
        ranks = {name: choice.at(price) for name, choice in choices.items()}
        return RankPlan(budget.spec, ranks, budget.storage)

    high = max(float(choice.rises.max()) for choice in choices.values()) + 1e-30
    low, plan = high * 1e-24, at(math.inf)
    for _ in range(HALVINGS):
        price = math.sqrt(low * high)
        trial = at(price)
        if budget.spare(trial) >= 0:
            high, plan = price, trial
        else:
            low = price
    return plan


def _spent(plan: RankPlan, spectra: Spectra, budget: _Budget, step: int) -> RankPlan:
    """Give what is left of a budget to the linears where `step` more ranks save most loss for what they cost."""
    ranks, spare = dict(plan.ranks), budget.spare(plan)
    while True:
        worth = [
            (gain / cost, linear.name, more, cost)
            for linear in plan.spec.linears
            for more, gain, cost in _raised(linear, ranks[linear.name], step, spectra, budget)
            if 0 < cost <= spare
        ]
        if not worth:
            return RankPlan(plan.spec, ranks, plan.storage)
        _, name, ranks[name], cost = max(worth, key=lambda row: row[:2])
        spare -= cost


def _raised(
    linear: LinearSpec, rank: int | None, step: int, spectra: Spectra, budget: _Budget
) -> list[tuple[int | None, float, int]]:
    """Return the next higher rank, or dense, with what it saves and costs; nothing for a dense linear."""
    if rank is None:
        return []
    more, rises = budget.useful(linear, rank + step), spectra.rises(linear.name)
    gain = rises[rank] - (0.0 if more is None else rises[more])
    return [(more, float(gain), budget.cost(linear, more) - budget.cost(linear, rank))]


def _fitted(plan: RankPlan, spectra: Spectra, budget: _Budget, step: int) -> RankPlan:
    """Return the plan cut down to the budget if it is above, and with what is left spent, in steps fine enough."""
    plan = _spent(_cut(plan, spectra, budget, step), spectra, budget, step)
    while step > 1 and budget.spare(plan) > budget.slack:
        step //= 2
        plan = _spent(plan, spectra, budget, step)
    return plan


def _cut(plan: RankPlan, spectra: Spectra, budget: _Budget, step: int) -> RankPlan:
    """Lower the ranks that lose least loss for what they save until the budget is met."""
    ranks, spare = dict(plan.ranks), budget.spare(plan)
    while spare < 0:
        worth = [
            row for linear in plan.spec.linears for row in _lowered(linear, ranks[linear.name], step, spectra, budget)
        ]
        if not worth:
            break
        _, name, ranks[name], saved = min(worth)
        spare += saved
    return RankPlan(plan.spec, ranks, plan.storage)


def _lowered(
    linear: LinearSpec, rank: int | None, step: int, spectra: Spectra, budget: _Budget
) -> list[tuple[float, str, int, int]]:
    """Return the next lower rank that saves something: loss for what is saved, name, rank, what is saved."""
    start = (min(linear.out_features, linear.in_features) // step + 1) * step if rank is None else rank
    for lower in range(start - step, 0, -step):
        saved = budget.cost(linear, rank) - budget.cost(linear, lower)
        if saved > 0 and budget.useful(linear, lower):
            rises = spectra.rises(linear.name)
            loss = rises[lower] - (0.0 if rank is None else rises[rank])
            return [(float(loss) / saved, linear.name, lower, saved)]
    return []


def _between(even: RankPlan, best: RankPlan, share: float, step: int) -> RankPlan:
    """Return the plan whose linears store what lies between two plans, `share` of the way from the first."""
    ranks: dict[str, int | None] = {}
    for linear in even.spec.linears:
        numbers = round((1 - share) * even.numbers(linear) + share * best.numbers(linear))
        ranks[linear.name] = _rank_for(linear, numbers, step, even.storage)
    return RankPlan(even.spec, ranks, even.storage)


def _rank_for(linear: LinearSpec, numbers: int, step: int, storage: Storage) -> int | None:
    rank = storage.largest_rank(linear.out_features, linear.in_features, numbers) // step * step
    return None if numbers >= linear.params else worthwhile(linear, max(step, rank), storage)


def _shifted(plan: RankPlan, shift: Shift) -> RankPlan:
    """Return the plan with budget moved between the linears of each block."""
    if not shift.share:
        return plan
    ranks = dict(plan.ranks)
    for block in plan.spec.blocks:
        inner = {linear.name.removeprefix(f"{block.name}."): linear for linear in block.linears}
        givers = [linear for name, linear in inner.items() if any(fnmatch(name, glob) for glob in shift.take)]
        takers = [linear for name, linear in inner.items() if any(fnmatch(name, glob) for glob in shift.give)]
        if not givers or not takers:
            continue
        moved = sum(shift.share * plan.numbers(linear) for linear in givers) / len(takers)
        for linear in givers:
            ranks[linear.name] = _rank_for(linear, int((1 - shift.share) * plan.numbers(linear)), 1, plan.storage)
        for linear in takers:
            ranks[linear.name] = _rank_for(linear, int(plan.numbers(linear) + moved), 1, plan.storage)
    return RankPlan(plan.spec, ranks, plan.storage)

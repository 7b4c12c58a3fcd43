"""Strategies that turn a size into a rank plan; each is its own configuration.

A new strategy is one frozen dataclass with `__call__`, added to `Allocator` at the end of the file.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, with_config

from lillama.errors import BudgetError
from lillama.model.spec import LinearSpec, ModelSpec
from lillama.ranks.plan import RankPlan, Scope, budget

Ranks = dict[str, int | None]
TOLERANCE = 0.005  # a budget is met from below within this share of the model, or of its blocks
PRINTED = 10_000  # the smallest reachable keep is named in steps of 1 / PRINTED


@with_config(extra="forbid")
@dataclass(frozen=True)
class Uniform:
    """Give every linear the same share of its break-even rank, rounded up to a multiple (arXiv 2412.16719).

    The share is the largest that meets the budget; what rounding leaves over goes to the first linears, one multiple each.

    Attributes:
        multiple_of: every rank is a multiple of this; halved for what is left over where the model is so small that the
            budget would be missed by more than 0.5 %.
    """

    name: Literal["uniform"] = "uniform"
    multiple_of: Annotated[int, Field(ge=1)] = 8

    def __call__(self, spec: ModelSpec, keep: float, scope: Scope = "model") -> RankPlan:
        """Return the plan that keeps at most `keep` of the model or of its blocks.

        Raises:
            BudgetError: no rank plan of this kind is small enough.
        """
        target = _checked_budget(spec, keep, scope)
        low, high = 0.0, 1.0
        ranks = self._ranks(spec.linears, low)
        _refuse_unreachable(RankPlan(spec, ranks), target, keep, scope)
        for _ in range(50):
            share = (low + high) / 2
            trial = self._ranks(spec.linears, share)
            if RankPlan(spec, trial).kept_params <= target:
                low, ranks = share, trial
            else:
                high = share
        if target == spec.params:
            return RankPlan(spec, _dense(spec))
        step = self.multiple_of
        ranks = _spend(spec, ranks, target, step)
        tolerance = TOLERANCE * (spec.params if scope == "model" else spec.block_params)
        while step > 1 and target - RankPlan(spec, ranks).kept_params > tolerance:
            step //= 2
            ranks = _spend(spec, ranks, target, step)
        return RankPlan(spec, ranks)

    def _ranks(self, linears: Iterable[LinearSpec], share: float) -> Ranks:
        return {linear.name: self._rank(linear, share * linear.break_even_rank) for linear in linears}

    def _rank(self, linear: LinearSpec, wanted: float) -> int | None:
        rank = max(1, math.ceil(wanted / self.multiple_of)) * self.multiple_of
        return rank if linear.params_at(rank) < linear.params else None


@with_config(extra="forbid")
@dataclass(frozen=True)
class Bottom:
    """Exhaust block 0 down to `min_rank`, then block 1, and so on until the budget is met (arXiv 2412.16719).

    The last linear touched gets the largest candidate (`min_rank`, `min_rank + step`, ...) that meets the budget; all
    blocks above stay dense.

    Attributes:
        min_rank: smallest rank; linears whose break-even rank is not above it stay dense.
        step: between candidates; halved for the last linear where it would miss the budget by more than 0.5 %.
    """

    name: Literal["bottom"] = "bottom"
    min_rank: Annotated[int, Field(ge=1)] = 1024
    step: Annotated[int, Field(ge=1)] = 256

    def __call__(self, spec: ModelSpec, keep: float, scope: Scope = "model") -> RankPlan:
        """Return the plan that keeps at most `keep` of the model or of its blocks.

        Raises:
            BudgetError: no rank plan of this kind is small enough.
        """
        return _exhaust(spec, spec.linears, self.min_rank, self.step, keep, scope)


@with_config(extra="forbid")
@dataclass(frozen=True)
class Top:
    """Exhaust the last block first, then the one before it: `Bottom` in reverse (arXiv 2412.16719).

    Attributes:
        min_rank: smallest rank; linears whose break-even rank is not above it stay dense.
        step: between candidates; halved for the last linear where it would miss the budget by more than 0.5 %.
    """

    name: Literal["top"] = "top"
    min_rank: Annotated[int, Field(ge=1)] = 1024
    step: Annotated[int, Field(ge=1)] = 256

    def __call__(self, spec: ModelSpec, keep: float, scope: Scope = "model") -> RankPlan:
        """Return the plan that keeps at most `keep` of the model or of its blocks.

        Raises:
            BudgetError: no rank plan of this kind is small enough.
        """
        linears = [linear for block in reversed(spec.blocks) for linear in block.linears]
        return _exhaust(spec, linears, self.min_rank, self.step, keep, scope)


Allocator = Uniform | Bottom | Top


def _exhaust(
    spec: ModelSpec, order: Sequence[LinearSpec], min_rank: int, step: int, keep: float, scope: Scope
) -> RankPlan:
    target = _checked_budget(spec, keep, scope)
    smallest = {linear.name: min_rank if linear.break_even_rank > min_rank else None for linear in order}
    _refuse_unreachable(RankPlan(spec, smallest), target, keep, scope)
    ranks = _dense(spec)
    excess = spec.params - target
    tolerance = TOLERANCE * (spec.params if scope == "model" else spec.block_params)
    for linear in order:
        if excess <= 0 or smallest[linear.name] is None:
            continue
        allowed = (linear.params - excess) / (linear.out_features + linear.in_features)
        rank = _candidate(linear, allowed, min_rank, step, tolerance)
        ranks[linear.name] = rank
        excess -= linear.params - linear.params_at(rank)
    return RankPlan(spec, ranks)


def _candidate(linear: LinearSpec, allowed: float, min_rank: int, step: int, tolerance: float) -> int:
    """Return the largest candidate up to `allowed`, at least `min_rank`; halve a step too coarse for the budget."""
    while True:
        rank = min_rank + max(0, math.floor((allowed - min_rank) / step)) * step
        if step == 1 or (allowed - rank) * (linear.out_features + linear.in_features) <= tolerance:
            return rank
        step //= 2


def _spend(spec: ModelSpec, ranks: Ranks, target: int, step: int) -> Ranks:
    """Give what is left of a budget to the first linears, `step` ranks each, or the way back to dense."""
    spare = target - RankPlan(spec, ranks).kept_params
    spent = dict(ranks)
    for linear in spec.linears:
        rank = spent[linear.name]
        if rank is None:
            continue
        more = rank + step if linear.params_at(rank + step) < linear.params else None
        cost = linear.params_at(more) - linear.params_at(rank)
        if cost <= spare:
            spent[linear.name] = more
            spare -= cost
    return spent


def _dense(spec: ModelSpec) -> Ranks:
    return {linear.name: None for linear in spec.linears}


def _checked_budget(spec: ModelSpec, keep: float, scope: Scope) -> int:
    if not 0 < keep <= 1:
        raise BudgetError(f"keep is {keep}; it is a share above 0 and at most 1")
    return budget(spec, keep, scope)


def _refuse_unreachable(smallest: RankPlan, target: int, keep: float, scope: Scope) -> None:
    if smallest.kept_params <= target:
        return
    spec = smallest.spec
    whole, kept = spec.params, smallest.kept_params
    if scope == "blocks":
        whole, kept = spec.block_params, kept - (spec.params - spec.block_params)
    steps = -(-kept * PRINTED // whole)
    reachable = (steps if int(steps / PRINTED * whole) >= kept else steps + 1) / PRINTED  # the product may round down
    remedy = "raise --keep, lower the recipe's smallest rank or add targets"
    if not smallest.factorised:
        remedy = "the recipe's smallest rank is at or above the break-even rank of every linear: lower it"
    raise BudgetError(
        f"keep {keep} of the {scope} is not reachable: the smallest reachable keep is {reachable:.4f} "
        f"({100 * (1 - kept / whole):.1f} % removed); {remedy}"
    )

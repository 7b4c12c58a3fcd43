"""Strategies that turn a size into a rank plan; each is its own configuration.

The published rules look at shapes alone; `adaptive.py` looks at the weights and at what they do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, with_config

from lillama.errors import BudgetError
from lillama.lowrank.storage import Storage
from lillama.model.spec import LinearSpec, ModelSpec
from lillama.ranks.plan import PLAIN, RankPlan, Scope, budget

Ranks = dict[str, int | None]
TOLERANCE = 0.005  # a budget is met from below within this share of the model, or of its blocks
BISECTIONS = 32  # of the share of the break-even ranks
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
    needs_spectra: ClassVar[bool] = False

    def __call__(self, spec: ModelSpec, keep: float, scope: Scope = "model", storage: Storage = PLAIN) -> RankPlan:
        """Return the plan that keeps at most `keep` of the model or of its blocks.

        Raises:
            BudgetError: no rank plan of this kind is small enough.
        """
        target = checked_budget(spec, keep, scope)
        if target == spec.params:
            return RankPlan(spec, _dense(spec), storage)
        low, high = 0.0, 1.0
        best = self._plan(spec, low, storage)
        refuse_unreachable(best, target, keep, scope)
        for _ in range(BISECTIONS):
            share = (low + high) / 2
            trial = self._plan(spec, share, storage)
            if trial.kept_params <= target:
                low, best = share, trial
            else:
                high = share
        step = self.multiple_of
        best = _spend(best, target, step)
        while step > 1 and target - best.kept_params > tolerance(spec, scope):
            step //= 2
            best = _spend(best, target, step)
        return best

    def _plan(self, spec: ModelSpec, share: float, storage: Storage) -> RankPlan:
        return RankPlan(spec, {linear.name: self._rank(linear, share, storage) for linear in spec.linears}, storage)

    def _rank(self, linear: LinearSpec, share: float, storage: Storage) -> int | None:
        wanted = share * linear.break_even_rank
        if storage.form == "pivot":
            wanted = storage.largest_rank(linear.out_features, linear.in_features, int(share * linear.params))
        return worthwhile(linear, max(1, math.ceil(wanted / self.multiple_of)) * self.multiple_of, storage)


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
    needs_spectra: ClassVar[bool] = False

    def __call__(self, spec: ModelSpec, keep: float, scope: Scope = "model", storage: Storage = PLAIN) -> RankPlan:
        """Return the plan that keeps at most `keep` of the model or of its blocks.

        Raises:
            BudgetError: no rank plan of this kind is small enough.
        """
        return _exhaust(spec, spec.linears, self.min_rank, self.step, keep, scope, storage)


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
    needs_spectra: ClassVar[bool] = False

    def __call__(self, spec: ModelSpec, keep: float, scope: Scope = "model", storage: Storage = PLAIN) -> RankPlan:
        """Return the plan that keeps at most `keep` of the model or of its blocks.

        Raises:
            BudgetError: no rank plan of this kind is small enough.
        """
        linears = [linear for block in reversed(spec.blocks) for linear in block.linears]
        return _exhaust(spec, linears, self.min_rank, self.step, keep, scope, storage)


Published = Uniform | Bottom | Top


def checked_budget(spec: ModelSpec, keep: float, scope: Scope) -> int:
    """Return the numbers that the whole model may store.

    Raises:
        BudgetError: `keep` is not a share.
    """
    if not 0 < keep <= 1:
        raise BudgetError(f"keep is {keep}; it is a share above 0 and at most 1")
    return budget(spec, keep, scope)


def tolerance(spec: ModelSpec, scope: Scope) -> float:
    """Return the numbers by which a budget may be missed from below."""
    return TOLERANCE * (spec.params if scope == "model" else spec.block_params)


def worthwhile(linear: LinearSpec, rank: int, storage: Storage) -> int | None:
    """Return a rank, or None (dense) where it would not be smaller than the dense weight."""
    if rank > min(linear.out_features, linear.in_features):
        return None
    return rank if storage.numbers(linear.out_features, linear.in_features, rank) < linear.params else None


def refuse_unreachable(smallest: RankPlan, target: int, keep: float, scope: Scope) -> None:
    """Raise `BudgetError` if even the smallest plan stores more than `target` numbers; it names the smallest keep."""
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


def _exhaust(
    spec: ModelSpec, order: Sequence[LinearSpec], min_rank: int, step: int, keep: float, scope: Scope, storage: Storage
) -> RankPlan:
    target = checked_budget(spec, keep, scope)
    smallest = {linear.name: worthwhile(linear, min_rank, storage) for linear in order}
    refuse_unreachable(RankPlan(spec, smallest, storage), target, keep, scope)
    ranks, excess, most = _dense(spec), spec.params - target, tolerance(spec, scope)
    for linear in order:
        if excess <= 0 or smallest[linear.name] is None:
            continue
        rank = _candidate(linear, linear.params - excess, min_rank, step, most, storage)
        ranks[linear.name] = rank
        excess -= linear.params - storage.numbers(linear.out_features, linear.in_features, rank)
    return RankPlan(spec, ranks, storage)


def _candidate(linear: LinearSpec, numbers: int, min_rank: int, step: int, tolerance: float, storage: Storage) -> int:
    """Return the largest candidate of at most `numbers`, at least `min_rank`; halve a step too coarse for the budget."""
    shape = linear.out_features, linear.in_features
    allowed = storage.largest_rank(*shape, numbers)
    while True:
        rank = min_rank + max(0, math.floor((allowed - min_rank) / step)) * step
        if step == 1 or numbers - storage.numbers(*shape, rank) <= tolerance:
            return rank
        step //= 2


def _spend(plan: RankPlan, target: int, step: int) -> RankPlan:
    """Give what is left of a budget to the first linears, `step` ranks each, or the way back to dense."""
    spare, spent = target - plan.kept_params, dict(plan.ranks)
    for linear, rank in plan:
        if rank is None:
            continue
        more = worthwhile(linear, rank + step, plan.storage)
        cost = plan.storage.numbers(linear.out_features, linear.in_features, more) - plan.numbers(linear)
        if cost <= spare:
            spent[linear.name] = more
            spare -= cost
    return RankPlan(plan.spec, spent, plan.storage)


def _dense(spec: ModelSpec) -> Ranks:
    return {linear.name: None for linear in spec.linears}

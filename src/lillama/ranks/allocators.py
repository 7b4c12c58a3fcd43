"""Strategies that turn a size into a rank plan; each is its own configuration.

The published rules look at shapes alone; `adaptive.py` looks at the weights and at what they do.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, ClassVar, Literal

from pydantic import Field, with_config

from lillama.errors import BudgetError
from lillama.lowrank.storage import Storage
from lillama.model.spec import LinearSpec, ModelSpec
from lillama.ranks.plan import PLAIN, RankPlan, Scope, Shape, budget

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
        target = resolve_numbers(spec, keep, scope)
        if target == spec.params:
            return RankPlan(spec, _dense(spec), storage)
        shapes = Counter(map(shape_of, spec.linears))
        most = target - spec.params + sum(count * rows * columns for (rows, columns), count in shapes.items())
        chosen = self._largest(shapes, most, storage)
        ranks: Ranks = {linear.name: chosen[shape_of(linear)] for linear in spec.linears}
        spare = most - _storage_of(shapes, chosen, storage)
        if spare < 0:
            raise unreachable(RankPlan(spec, ranks, storage), keep, scope)
        step = self.multiple_of
        ranks, spare = _spend(spec.linears, ranks, spare, step, storage)
        while step > 1 and spare > tolerance(spec, scope):
            step //= 2
            ranks, spare = _spend(spec.linears, ranks, spare, step, storage)
        return RankPlan(spec, ranks, storage)

    def _largest(self, shapes: Mapping[Shape, int], most: int, storage: Storage) -> dict[Shape, int | None]:
        """Return the ranks of the largest share that stores at most so many numbers, of share 0 if there is none."""
        low, high = 0.0, 1.0
        best = self._ranks(shapes, low, storage)
        for _ in range(BISECTIONS):
            share = (low + high) / 2
            trial = self._ranks(shapes, share, storage)
            if _storage_of(shapes, trial, storage) <= most:
                low, best = share, trial
            else:
                high = share
        return best

    def _ranks(self, shapes: Iterable[Shape], share: float, storage: Storage) -> dict[Shape, int | None]:
        return {shape: self._rank(shape, share, storage) for shape in shapes}

    def _rank(self, shape: Shape, share: float, storage: Storage) -> int | None:
        rows, columns = shape
        wanted = share * (rows * columns / (rows + columns))  # the break-even rank of plain factors
        if storage.form == "pivot":
            wanted = storage.largest_rank(rows, columns, int(share * (rows * columns)))
        return worthwhile(shape, max(1, math.ceil(wanted / self.multiple_of)) * self.multiple_of, storage)


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


def resolve_numbers(spec: ModelSpec, keep: float, scope: Scope) -> int:
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


def shape_of(linear: LinearSpec) -> Shape:
    """Return rows and columns of a linear's weight."""
    return linear.out_features, linear.in_features


def worthwhile(shape: Shape, rank: int, storage: Storage) -> int | None:
    """Return a rank, or None (dense) where it would not be smaller than the dense weight."""
    if rank > min(shape):
        return None
    return rank if storage.numbers(*shape, rank) < storage.numbers(*shape, None) else None


def unreachable(smallest: RankPlan, keep: float, scope: Scope) -> BudgetError:
    """Return the refusal of a `keep` below that of the smallest plan, which it names."""
    spec = smallest.spec
    whole, kept = spec.params, smallest.kept_params
    if scope == "blocks":
        whole, kept = spec.block_params, kept - (spec.params - spec.block_params)
    steps = -(-kept * PRINTED // whole)
    reachable = (steps if int(steps / PRINTED * whole) >= kept else steps + 1) / PRINTED  # the product may round down
    remedy = "raise --keep, lower the recipe's smallest rank or add targets"
    if not smallest.factorised:
        remedy = "the recipe's smallest rank is at or above the break-even rank of every linear: lower it"
    return BudgetError(
        f"keep {keep} of the {scope} is not reachable: the smallest reachable keep is {reachable:.4f} "
        f"({100 * (1 - kept / whole):.1f} % removed); {remedy}"
    )


def _exhaust(
    spec: ModelSpec, order: Sequence[LinearSpec], min_rank: int, step: int, keep: float, scope: Scope, storage: Storage
) -> RankPlan:
    target = resolve_numbers(spec, keep, scope)
    smallest = {linear.name: worthwhile(shape_of(linear), min_rank, storage) for linear in order}
    least = RankPlan(spec, smallest, storage)
    if least.kept_params > target:
        raise unreachable(least, keep, scope)
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


def _storage_of(shapes: Mapping[Shape, int], ranks: Mapping[Shape, int | None], storage: Storage) -> int:
    """Return the numbers that so many linears of each shape store at the shape's rank."""
    return sum(count * storage.numbers(*shape, ranks[shape]) for shape, count in shapes.items())


def _spend(linears: Iterable[LinearSpec], ranks: Ranks, spare: int, step: int, storage: Storage) -> tuple[Ranks, int]:
    """Give what is left of a budget to the first linears, `step` ranks each, or the way back to dense.

    Returns:
        the ranks, and what is left then.
    """
    spent = dict(ranks)

    @cache
    def raised(shape: Shape, rank: int) -> tuple[int | None, int]:
        more = worthwhile(shape, rank + step, storage)
        return more, storage.numbers(*shape, more) - storage.numbers(*shape, rank)

    for linear in linears:
        rank = ranks[linear.name]
        if rank is None:
            continue
        more, cost = raised(shape_of(linear), rank)
        if cost <= spare:
            spent[linear.name] = more
            spare -= cost
    return spent, spare


def _dense(spec: ModelSpec) -> Ranks:
    return {linear.name: None for linear in spec.linears}

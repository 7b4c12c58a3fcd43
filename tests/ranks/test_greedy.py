"""The same ranks as the rules give when they are followed to the letter, linear by linear; and soon enough for thousands."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lillama.errors import BudgetError
from lillama.lowrank.storage import Storage
from lillama.model.spec import BlockSpec, LinearSpec, ModelSpec
from lillama.ranks import greedy
from lillama.ranks.adaptive import LEAST_PRICE, Adaptive
from lillama.ranks.allocators import BISECTIONS, TOLERANCE, Uniform
from lillama.ranks.budget import Budget
from lillama.ranks.greedy import cut_ranks, fit_ranks, spend_budget
from lillama.ranks.plan import RankPlan
from lillama.ranks.spectra import Spectra

RELAXED = settings(max_examples=40, deadline=None)
storages = st.sampled_from([Storage("plain"), Storage("pivot"), Storage("pivot", bits=8), Storage("plain", bits=4)])
shapes = st.sampled_from([(8, 8), (12, 30), (30, 12), (40, 40), (17, 23)])
steps, seeds, keeps = st.sampled_from([1, 2, 4, 8]), st.integers(0, 99), st.floats(0.2, 0.95)
sketches = st.lists(st.lists(shapes, min_size=1, max_size=5), min_size=1, max_size=3)
Move = tuple[float, str, int | None, int]


def drawn(sketch: list[list[tuple[int, int]]]) -> ModelSpec:
    blocks = []
    for index, pairs in enumerate(sketch):
        linears = tuple(LinearSpec(f"layers.{index}.{i}", *pair) for i, pair in enumerate(pairs))
        blocks.append(BlockSpec(f"layers.{index}", index, sum(x.params for x in linears), linears))
    return ModelSpec("Any", 16, "bfloat16", 2, 100 + sum(block.params for block in blocks), tuple(blocks))


def made_up(spec: ModelSpec, seed: int) -> Spectra:
    """Return spectra of which many are equal to others, or have equal values: all ties there are."""
    rng = np.random.default_rng(seed)
    rows = [
        np.sort(rng.integers(0, 4, 40))[::-1].astype(float),
        np.ones(40),
        np.exp(-0.2 * np.arange(40)),
        np.zeros(40),
    ]
    return Spectra({
        linear.name: rows[rng.integers(len(rows))][: min(linear.out_features, linear.in_features)]
        for linear in spec.linears
    })  # fmt: skip


def cost(budget: Budget, linear: LinearSpec, rank: int | None) -> int:
    shape = linear.out_features, linear.in_features
    itemsize = budget.spec.bytes_per_param
    return budget.storage.nbytes(*shape, rank, itemsize) if budget.in_bytes else budget.storage.numbers(*shape, rank)


def left(budget: Budget, plan: RankPlan) -> int:
    return budget.most - (plan.kept_bytes if budget.in_bytes else plan.kept_params)


def loss(spectra: Spectra, linear: LinearSpec, rank: int | None) -> float:
    squares = np.concatenate(([0.0], np.cumsum(spectra.singular[linear.name][::-1] ** 2)))
    return 0.0 if rank is None else float(0.5 * squares[len(squares) - 1 - rank])


def useful(budget: Budget, linear: LinearSpec, rank: int) -> bool:
    full = min(linear.out_features, linear.in_features)
    return 0 < rank <= full and cost(budget, linear, rank) < cost(budget, linear, None)


def moves_up(plan: RankPlan, spectra: Spectra, budget: Budget, step: int) -> Iterator[Move]:
    """Yield what can be afforded: loss saved for a unit of cost, name, new rank, cost."""
    for linear, rank in plan:
        if rank is not None:
            more = rank + step if useful(budget, linear, rank + step) else None
            extra = cost(budget, linear, more) - cost(budget, linear, rank)
            if 0 < extra <= left(budget, plan):
                yield (loss(spectra, linear, rank) - loss(spectra, linear, more)) / extra, linear.name, more, extra


def moves_down(plan: RankPlan, spectra: Spectra, budget: Budget, step: int) -> Iterator[Move]:
    """Yield the nearest lower multiple of the step that saves something: loss for a unit saved, name, rank, saved."""
    for linear, rank in plan:
        ranks = range(1, 41) if rank is None else range(1, rank)
        possible = [r for r in ranks if (r if rank is None else rank - r) % step == 0 and useful(budget, linear, r)]
        for lower in reversed(possible):
            saved = cost(budget, linear, rank) - cost(budget, linear, lower)
            if saved > 0:
                yield (loss(spectra, linear, lower) - loss(spectra, linear, rank)) / saved, linear.name, lower, saved
                break


@RELAXED
@given(sketches, keeps, keeps, seeds, storages, steps, st.booleans())
def test_spending_takes_the_best_affordable_move_of_all_again_and_again(
    sketch, start: float, end: float, seed: int, storage: Storage, step: int, in_bytes: bool
) -> None:
    spec = drawn(sketch)
    spectra = made_up(spec, seed)
    budget = Budget.of(spec, max(start, end), "model", storage, int(end * spec.params * 2) if in_bytes else None)
    chance = np.random.default_rng(seed)
    plan = RankPlan(spec, {x.name: int(chance.integers(1, 1 + min(x.out_features, x.in_features) // 2)) for x in spec.linears},
                    storage)  # fmt: skip
    expected = plan
    while moves := sorted(moves_up(expected, spectra, budget, step)):
        best = [move for move in moves if move[0] == moves[-1][0]][-1]
        expected = replace(expected, ranks=dict(expected.ranks) | {best[1]: best[2]})
    assert spend_budget(plan, spectra, budget, step) == expected


@RELAXED
@given(sketches, keeps, seeds, storages, steps, st.booleans())
def test_cutting_takes_the_cheapest_move_of_all_until_the_budget_is_met(
    sketch, keep: float, seed: int, storage: Storage, step: int, in_bytes: bool
) -> None:
    spec = drawn(sketch)
    spectra = made_up(spec, seed)
    budget = Budget.of(spec, keep, "model", storage, int(keep * spec.params * 2) if in_bytes else None)
    plan = expected = RankPlan(spec, {linear.name: None for linear in spec.linears}, storage)
    while left(budget, expected) < 0 and (moves := list(moves_down(expected, spectra, budget, step))):
        _, name, lower, _ = min(moves)
        expected = replace(expected, ranks=dict(expected.ranks) | {name: lower})
    assert cut_ranks(plan, spectra, budget, step) == expected


@RELAXED
@given(sketches, keeps, seeds, storages, steps, st.floats(0, 1))
def test_the_price_is_the_one_that_a_search_linear_by_linear_finds(
    sketch, keep: float, seed: int, storage: Storage, step: int, floor: float
) -> None:
    spec = drawn(sketch)
    spectra, allocate = made_up(spec, seed), Adaptive(multiple_of=step, floor=floor)
    try:
        plan = allocate(spec, keep, "model", storage, spectra)
    except BudgetError:
        return
    budget, even = (
        Budget.of(spec, keep, "model", storage, None),
        Uniform(multiple_of=step)(spec, keep, "model", storage),
    )
    choices = {linear.name: [*rows(linear, even[linear.name], floor, step, spectra, budget)] for linear in spec.linears}

    def at(price: float) -> RankPlan:
        best = {name: min(found, key=lambda row: row[0] + price * row[1]) for name, found in choices.items()}
        return RankPlan(spec, {name: row[2] for name, row in best.items()}, storage)

    high = max(row[0] for found in choices.values() for row in found) + 1e-30
    smallest = {name: min(found, key=lambda row: row[1])[2] for name, found in choices.items()}
    low, expected = high * LEAST_PRICE, RankPlan(spec, smallest, storage)
    for _ in range(100):
        price = math.sqrt(low * high)
        if left(budget, trial := at(price)) >= 0:
            high, expected = price, trial
        else:
            low = price
    assert plan == fit_ranks(spend_budget(expected, spectra, budget, step), spectra, budget, step)


def rows(
    linear: LinearSpec, even: int | None, floor: float, step: int, spectra: Spectra, budget: Budget
) -> Iterator[tuple[float, int, int | None]]:
    """Yield loss, cost and rank of all that a linear may have, the dense weight last."""
    full = min(linear.out_features, linear.in_features)
    first = max(1, math.ceil(floor * (even or full) / step)) * step
    for rank in (*(rank for rank in range(first, full + 1, step) if useful(budget, linear, rank)), None):
        yield loss(spectra, linear, rank), cost(budget, linear, rank), rank


@RELAXED
@given(sketches, keeps, storages, steps)
def test_uniform_finds_the_share_that_a_search_linear_by_linear_finds(
    sketch, keep: float, storage: Storage, step: int
) -> None:
    spec = drawn(sketch)
    try:
        plan = Uniform(multiple_of=step)(spec, keep, "model", storage)
    except BudgetError:
        return
    budget = Budget.of(spec, keep, "model", storage, None)

    def at(share: float) -> RankPlan:
        ranks: dict[str, int | None] = {}
        for linear in spec.linears:
            wanted = share * linear.break_even_rank
            if storage.form == "pivot":
                wanted = storage.largest_rank(linear.out_features, linear.in_features, int(share * linear.params))
            rank = max(1, math.ceil(wanted / step)) * step
            ranks[linear.name] = rank if useful(budget, linear, rank) else None
        return RankPlan(spec, ranks, storage)

    low, high, expected = 0.0, 1.0, at(0.0)
    for _ in range(BISECTIONS):
        share = (low + high) / 2
        if left(budget, trial := at(share)) >= 0:
            low, expected = share, trial
        else:
            high = share
    while True:
        ranks, spare = dict(expected.ranks), left(budget, expected)
        for linear, rank in expected:
            if rank is not None:
                more = rank + step if useful(budget, linear, rank + step) else None
                extra = cost(budget, linear, more) - cost(budget, linear, rank)
                if extra <= spare:
                    ranks[linear.name], spare = more, spare - extra
        expected = replace(expected, ranks=ranks)
        if step == 1 or spare <= TOLERANCE * spec.params:
            break
        step //= 2
    assert plan == expected


def test_the_work_for_thousands_of_linears_grows_with_the_ranks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that looks through all linears again would ask a thousand times as often."""
    asked = []
    for name in ("_raise_ranks", "_lower_ranks"):
        ask = getattr(greedy, name)
        monkeypatch.setattr(greedy, name, lambda *args, _ask=ask: (asked.append(1), _ask(*args))[1])
    spec = drawn([[(512, 192), (192, 512)] * 64] * 24)
    rng = np.random.default_rng(0)
    spectra = Spectra({x.name: np.exp(rng.normal() - rng.uniform(0.01, 0.1) * np.arange(192)) for x in spec.linears})
    plans = Adaptive().candidates(spec, 0.6, "model", Storage("pivot"), spectra)
    assert len(spec.linears) <= len(asked) < 12 * len(spec.linears)
    assert all(0.599 < plan.keep <= 0.6 for _, plan in plans)

"""Rank after rank, where it saves most loss for what it costs: how a plan is fitted to a budget."""

from dataclasses import replace
from heapq import heapify, heappop, heappush

from lillama.model.spec import LinearSpec
from lillama.ranks.budget import Budget
from lillama.ranks.plan import RankPlan
from lillama.ranks.spectra import Spectra


def fit_ranks(plan: RankPlan, spectra: Spectra, budget: Budget, step: int) -> RankPlan:
    """Return the plan cut down to the budget if it is above, and with what is left spent, in steps fine enough."""
    plan = spend_budget(cut_ranks(plan, spectra, budget, step), spectra, budget, step)
    while step > 1 and budget.spare(plan) > budget.slack:
        step //= 2
        plan = spend_budget(plan, spectra, budget, step)
    return plan


def spend_budget(plan: RankPlan, spectra: Spectra, budget: Budget, step: int) -> RankPlan:
    """Give what is left of a budget to the linears where `step` more ranks save most loss for what they cost.

    A linear that can no longer be afforded never will be: what is left only shrinks. Of equal ones the last name wins.
    """
    ranks, spare = dict(plan.ranks), budget.spare(plan)
    linears = sorted(plan.spec.linears, key=lambda linear: linear.name, reverse=True)

    def raised(place: int) -> list[tuple[float, int, int | None, int]]:
        linear = linears[place]
        return [
            (-gain / cost, place, more, cost)
            for more, gain, cost in _raise_ranks(linear, ranks[linear.name], step, spectra, budget)
            if 0 < cost <= spare
        ]

    worth = [row for place in range(len(linears)) for row in raised(place)]
    heapify(worth)
    while worth:
        _, place, more, cost = heappop(worth)
        if cost > spare:
            continue
        ranks[linears[place].name] = more
        spare -= cost
        for row in raised(place):
            heappush(worth, row)
    return replace(plan, ranks=ranks)


def cut_ranks(plan: RankPlan, spectra: Spectra, budget: Budget, step: int) -> RankPlan:
    """Lower the ranks that lose least loss for what they save until the budget is met; of equal ones the first name."""
    ranks, spare = dict(plan.ranks), budget.spare(plan)
    if spare >= 0:
        return plan
    linears = {linear.name: linear for linear in plan.spec.linears if linear.name not in plan.shapes}
    worth = [
        row for linear in linears.values() for row in _lower_ranks(linear, ranks[linear.name], step, spectra, budget)
    ]
    heapify(worth)
    while worth and spare < 0:
        _, name, ranks[name], saved = heappop(worth)
        spare += saved
        for row in _lower_ranks(linears[name], ranks[name], step, spectra, budget):
            heappush(worth, row)
    return replace(plan, ranks=ranks)


def _raise_ranks(
    linear: LinearSpec, rank: int | None, step: int, spectra: Spectra, budget: Budget
) -> list[tuple[int | None, float, int]]:
    """Return the next higher rank, or dense, with what it saves and costs; nothing for a dense linear."""
    if rank is None:
        return []
    more, rises = budget.useful(linear, rank + step), spectra.rises(linear.name)
    gain = rises[rank] - (0.0 if more is None else rises[more])
    return [(more, float(gain), budget.cost(linear, more) - budget.cost(linear, rank))]


def _lower_ranks(
    linear: LinearSpec, rank: int | None, step: int, spectra: Spectra, budget: Budget
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

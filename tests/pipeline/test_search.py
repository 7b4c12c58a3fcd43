"""The search for the smallest model within a bound on the loss, on curves that are known."""

import pytest

from lillama.errors import BudgetError
from lillama.pipeline.bisection import ATTEMPTS, CLOSE, smallest_within


def predicted(keep: float) -> float:
    return 0.2 * (1 - keep) ** 2


@pytest.mark.parametrize("most", [0.005, 0.02, 0.05, 0.1])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.5, 3.0])
def test_the_bound_is_kept_and_nearly_used(most: float, factor: float) -> None:
    def measured(keep: float) -> float:
        return factor * (1 + 0.5 * (1 - keep)) * predicted(keep)

    keep, attempts = smallest_within(most, predicted, measured)
    assert measured(keep) <= most and len(attempts) <= ATTEMPTS
    assert measured(keep) >= CLOSE * most or keep < 0.06
    assert keep == min(attempt.keep for attempt in attempts if attempt.rise <= most)


def test_an_unreachable_bound_is_refused_with_the_best_that_was_made() -> None:
    with pytest.raises(
        BudgetError, match=r"max-loss 0.001 was not reached: at keep 0.99\d* the held-out loss rises by 0.5"
    ):
        smallest_within(0.001, predicted, lambda keep: 0.5)


def test_keeps_that_cannot_be_reached_are_not_tried() -> None:
    tried = []

    def measured(keep: float) -> float:
        tried.append(keep)
        return 0.0

    smallest_within(0.01, lambda keep: predicted(keep) if keep > 0.8 else float("inf"), measured)
    assert min(tried) > 0.8

"""The learning rate by the loss after a first step."""

import math

import pytest

from lillama.distill.rate import MARGIN, measure_lr


@pytest.mark.parametrize("guess", [1e-4, 4e-3, 0.02, 1.0])
@pytest.mark.parametrize("best", [7e-4, 0.01, 0.3])
def test_the_smallest_loss_of_a_parabola_is_found_from_any_guess(guess, best):
    def loss_at(rate: float) -> float:
        return 1 + (rate - best) ** 2

    assert measure_lr(loss_at, loss_at(0), guess) == pytest.approx(MARGIN * best, rel=1e-6)


def test_a_loss_that_is_not_finite_is_a_high_one():
    def loss_at(rate: float) -> float:
        return 1 - rate if rate < 0.01 else math.nan

    assert 0.004 <= measure_lr(loss_at, 1.0, 0.08) / MARGIN < 0.01


def test_where_no_rate_gains_a_tiny_one_is_taken():
    tried = []

    def loss_at(rate: float) -> float:
        tried.append(rate)
        return 1 + rate

    assert measure_lr(loss_at, 1.0, 1.0) < 1e-3 and len(tried) < 20


def test_where_the_loss_falls_on_and_on_the_search_ends():
    assert 1 < measure_lr(lambda rate: -rate, 0.0, 1.0) < 1e5

"""The learning rate by measurement: how far the first step may go.

Adam's first step moves every number by the rate, up or down. The loss along that direction falls, then rises; where it is
smallest is within a factor of 2 of the best peak rate of a whole training, on models of 0.26 and 8 M parameters whose best
rates lie a factor of 10 apart (docs/findings.md has the tables, and a run of 135 M). No rate relative to the weights alone
does this: the good one falls as less error is left, and differs from model to model.
"""

import math
from collections.abc import Callable

MARGIN = 1.25  # the peak rate over that of the best single step: later steps go less far, for gradients disagree
TRIES = 12  # doublings or halvings in search of the smallest loss; so far from the guess no rate is looked for


def measure_lr(loss_at: Callable[[float], float], start: float, guess: float) -> float:
    """Return the peak rate for a training from the losses after its first step at several rates.

    The rate is doubled or halved from the guess on until the loss at it is smaller than at half and at twice of it; a
    parabola in the rate through these three gives the smallest loss.

    Args:
        loss_at: returns the loss where the first step was taken at a rate; it need not be finite.
        start: loss before any step.
        guess: rate to begin with.

    Returns:
        the rate; the smallest that was tried where none gains.

    Examples:
        >>> round(measure_lr(lambda rate: 1 - rate + 25 * rate**2, start=1.0, guess=0.004), 4)  # smallest at 0.02
        0.025
    """
    losses = {0.0: start}

    def loss(rate: float) -> float:
        if rate not in losses:
            found = loss_at(rate)
            losses[rate] = found if math.isfinite(found) else math.inf
        return losses[rate]

    rate = guess
    for _ in range(TRIES):
        if loss(rate) >= start or loss(rate / 2) < loss(rate):
            rate /= 2
        elif loss(2 * rate) < loss(rate):
            rate *= 2
        else:
            break
    return MARGIN * _vertex(rate, loss(rate / 2), loss(rate), loss(2 * rate))


def _vertex(rate: float, half: float, here: float, twice: float) -> float:
    """Return the rate of the smallest value of a parabola through three, at rate / 2, rate and 2 rate; within these."""
    if not (math.isfinite(half) and math.isfinite(twice)):
        return rate
    left, right = (here - half) / (rate / 2), (twice - here) / rate  # slopes at 3/4 and at 3/2 of the rate
    if right <= left:
        return rate
    return min(max(rate * (0.75 - 0.75 * left / (right - left)), rate / 2), 2 * rate)

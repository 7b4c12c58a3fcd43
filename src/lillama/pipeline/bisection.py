"""The smallest model within a bound on the loss: predicted from spectra, then measured and corrected."""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from lillama.errors import BudgetError

ATTEMPTS = 4
CLOSE = 0.75  # a measured rise between this share of the bound and the bound is near enough
FIRST_GUESS = 1.5  # measured rise of a finished model over the predicted one, before any was measured
STEP = 0.0025
GRID = [round(0.05 + STEP * index, 4) for index in range(377)]  # up to 0.99


@dataclass(frozen=True)
class Attempt:
    """A finished model on the way to the goal.

    Attributes:
        keep: share of the parameters that was asked for.
        rise: of the loss on the held-out calibration sequences, in nats a token.
    """

    keep: float
    rise: float


def smallest_within(
    most: float, predicted: Callable[[float], float], attempt: Callable[[float], float]
) -> tuple[float, list[Attempt]]:
    """Find the smallest `keep` whose finished model's loss rises by at most `most`.

    The predicted curve gives the first `keep`. Each measured model then says by what factor the prediction misses; between
    two measured models the factor is interpolated over `keep`, geometrically.

    Args:
        most: largest rise of the loss, in nats a token.
        predicted: keep -> rise by the spectra; inf where it cannot be reached.
        attempt: makes a model at a keep and returns its measured rise.

    Returns:
        the best keep, and all attempts in order.

    Raises:
        BudgetError: no attempt was within the bound.
    """
    predicted = cache(predicted)
    done: list[Attempt] = []
    while len(done) < ATTEMPTS:
        keep = _next(most, predicted, done)
        if any(abs(keep - one.keep) < STEP / 2 for one in done):
            break
        done.append(Attempt(keep, attempt(keep)))
        if CLOSE * most <= done[-1].rise <= most:
            break
    within = [one.keep for one in done if one.rise <= most]
    if not within:
        best = min(done, key=lambda one: (one.rise, -one.keep))
        raise BudgetError(
            f"max-loss {most:g} was not reached: at keep {best.keep:.4f} the held-out loss rises by {best.rise:.4f} nats; "
            "allow more, or calibrate on more tokens"
        )
    return min(within), done


def _next(most: float, predicted: Callable[[float], float], done: list[Attempt]) -> float:
    """Return the smallest keep that is expected to be within the bound, above all that were not."""
    failed = max((one.keep for one in done if one.rise > most), default=0.0)
    grid = [keep for keep in GRID if keep > failed]
    fitting = bisect_left(grid, True, key=lambda keep: predicted(keep) * _factor(keep, predicted, done) <= most)
    return grid[fitting] if fitting < len(grid) else GRID[-1]


def _factor(keep: float, predicted: Callable[[float], float], done: list[Attempt]) -> float:
    """Return how many times the predicted rise is expected to be measured at a keep."""
    known = sorted((one.keep, max(one.rise, 1e-6) / max(predicted(one.keep), 1e-12)) for one in done)
    if not known:
        return FIRST_GUESS
    below = [row for row in known if row[0] <= keep]
    above = [row for row in known if row[0] >= keep]
    if not below or not above:
        return (known[0] if not below else known[-1])[1]
    (left, a), (right, b) = below[-1], above[0]
    share = 0.0 if left == right else (keep - left) / (right - left)
    return math.exp((1 - share) * math.log(a) + share * math.log(b))

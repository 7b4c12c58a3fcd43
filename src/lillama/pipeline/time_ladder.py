"""What fits into some time: tokens of calibration, epochs of distillation, and what is left for recovery."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from lillama.ranks.plan import RankPlan
from lillama.recipes.recipe import Recipe

LADDER = tuple(2048 * 2**power for power in range(10))  # tokens of calibration
EPOCHS = (
    4,
    2,
    1,
    0,
)  # of distillation, where there is no recovery: that brings more in the same time (docs/findings.md)
MEASURED, DISTILLED = 0.5, 0.9  # shares of the time that estimates may fill: before any training, with distillation
MOST_EPOCHS = 16  # of recovery: more learn the text by heart
EXPORT = 0.04  # share of the time that writing the result may take
BUDGETS = (300.0, 1200.0, 3600.0, 10_800.0, 43_200.0)  # seconds, of which `lillama plan` tells what fits


@dataclass(frozen=True)
class Rung:
    """What fits into some time.

    Attributes:
        seconds: that there are.
        tokens: of calibration.
        distill_epochs: passes over them in distillation.
        recover_epochs: about so many passes in recovery.
    """

    seconds: float
    tokens: int
    distill_epochs: int
    recover_epochs: float


def choose(recipe: Recipe, seconds: float, cost: Callable[[Recipe], float]) -> Recipe:
    """Return a recipe whose calibration tokens fit into some time; recovery takes the rest, or else distillation.

    Args:
        recipe: that says all else.
        seconds: of the whole command.
        cost: returns the estimated seconds of a recipe, recovery left out.
    """

    def fits(tokens: int, epochs: int, share: float) -> bool:
        return cost(with_effort(recipe, tokens, epochs)) <= share * seconds

    tokens, most = max((size for size in LADDER if fits(size, 0, MEASURED)), default=LADDER[0]), recipe.distill.epochs
    if recipe.recover.wanted:
        return with_effort(recipe, tokens, 0)
    epochs = next((count for count in (most, *EPOCHS) if count <= most and fits(tokens, count, DISTILLED)), 0)
    return with_effort(recipe, tokens, epochs)


def ladder(recipe: Recipe, plan: RankPlan, cost: Callable[[Recipe], float]) -> tuple[Rung, ...]:
    """Return what fits into five minutes, and into more.

    Args:
        recipe: that says all else.
        plan: ranks of the model's linears.
        cost: returns the estimated seconds of a recipe.
    """
    rungs = list[Rung]()
    for seconds in BUDGETS:
        chosen = choose(recipe, seconds, lambda one: cost(unrecovered(one)))
        left, passes = seconds * (1 - EXPORT) - cost(unrecovered(chosen)), 0.0
        if recipe.recover.wanted and plan.factorised:
            one = replace(chosen, recover=replace(chosen.recover, epochs=1, steps=None))
            passes = min(max(left, 0.0) / max(cost(one) - cost(unrecovered(one)), 1e-9), float(MOST_EPOCHS))
        rungs.append(Rung(seconds, chosen.calibration.tokens, chosen.distill.epochs, round(passes, 2)))
    return tuple(rungs)


def with_effort(recipe: Recipe, tokens: int, epochs: int) -> Recipe:
    """Return a recipe of so many calibration tokens and epochs of distillation."""
    return replace(
        recipe,
        calibration=replace(recipe.calibration, tokens=tokens),
        distill=replace(recipe.distill, epochs=epochs),
    )


def unrecovered(recipe: Recipe) -> Recipe:
    """Return a recipe without recovery."""
    return replace(recipe, recover=replace(recipe.recover, epochs=0, steps=None))

"""What fits into some time: calibration tokens, those of them for the closed form, epochs, and what is left for recovery."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from lillama.lowrank.rounding import ROUNDED_TOKENS
from lillama.ranks.bits import MixedBits
from lillama.ranks.plan import RankPlan
from lillama.recipes.recipe import Recipe

LADDER = tuple(2048 * 2**power for power in range(12))  # tokens of calibration
EPOCHS = (
    4,
    2,
    1,
    0,
)  # of distillation, where recovery does not reach: that brings more in the same time (docs/findings.md)
# Shares of the time that estimates may fill: before any training, with that of the stacks before the last, with distillation.
MEASURED, EARLIER, DISTILLED = 0.5, 0.7, 0.9
SURPLUS = 1.5  # times the text that recovery reads once by the estimate, which errs on the side of too much time
MOST_EPOCHS = 16  # of recovery: more learn the text by heart
EXPORT = 0.04  # share of the time that writing the result may take
BUDGETS = (300.0, 1200.0, 3600.0, 10_800.0, 43_200.0)  # seconds, of which `lillama plan` tells what fits

Cost = Callable[[Recipe], float]  # returns the estimated seconds of a recipe


@dataclass(frozen=True)
class Rung:
    """What fits into some time.

    Attributes:
        seconds: that there are.
        tokens: of calibration.
        distill_tokens: those of them that initialisation and distillation see.
        distill_epochs: passes over these.
        recover_epochs: about so many passes over all in recovery.
    """

    seconds: float
    tokens: int
    distill_tokens: int
    distill_epochs: int
    recover_epochs: float


def choose(recipe: Recipe, seconds: float, cost: Cost, stacks: int = 1, most_tokens: int | None = None) -> Recipe:
    """Return a recipe whose calibration tokens fit into some time; recovery takes the rest, or else distillation.

    Args:
        recipe: that says all else.
        seconds: of the whole command.
        cost: returns the estimated seconds of a recipe.
        stacks: of blocks; recovery reaches the last one, and distillation teaches the others.
        most_tokens: of calibration that may be chosen; None knows no bound.
    """
    if isinstance(recipe.ranks, MixedBits):  # which looks at no more text than this
        most_tokens = min(most_tokens or ROUNDED_TOKENS, ROUNDED_TOKENS)
    sizes = [size for size in LADDER if most_tokens is None or size <= most_tokens] or [LADDER[0]]

    def fits(tokens: int, epochs: int, share: float) -> bool:
        one = with_effort(recipe, tokens, tokens, epochs)
        return cost(_least_recovery(one) if recipe.recover.wanted else one) <= share * seconds

    local, most = max((size for size in sizes if fits(size, 0, MEASURED)), default=sizes[0]), recipe.distill.epochs
    if recipe.recover.wanted:
        counts = (most, *EPOCHS) if stacks > 1 else (0,)
        taught = next((count for count in counts if count <= most and fits(local, count, EARLIER)), 0)
        once = (with_effort(recipe, size, local, taught) for size in sizes if size > local)
        surplus = SURPLUS if recipe.calibration.sources else 1.0  # what the model writes costs time, read or not
        longer = (one for one in once if cost(_one_epoch(one)) <= surplus * seconds)
        return max(longer, key=lambda one: one.calibration.tokens, default=with_effort(recipe, local, local, taught))
    epochs = next((count for count in (most, *EPOCHS) if count <= most and fits(local, count, DISTILLED)), 0)
    return with_effort(recipe, local, local, epochs)


def ladder(recipe: Recipe, plan: RankPlan, cost: Cost) -> tuple[Rung, ...]:
    """Return what fits into five minutes, and into more.

    Args:
        recipe: that says all else.
        plan: ranks of the model's linears.
        cost: returns the estimated seconds of a recipe.
    """
    rungs = list[Rung]()
    for seconds in BUDGETS:
        chosen = choose(recipe, seconds, cost, plan.spec.kind.stacks)
        before = cost(_least_recovery(chosen) if recipe.recover.wanted else chosen)
        left, passes = seconds * (1 - EXPORT) - before, 0.0
        if recipe.recover.wanted and plan.reduces:
            an_epoch = cost(_one_epoch(chosen)) - before
            passes = min(max(left, 0.0) / max(an_epoch, 1e-9), float(MOST_EPOCHS))
        tokens, distill = chosen.calibration.tokens, chosen.distill
        rungs.append(Rung(seconds, tokens, distill.tokens or tokens, distill.epochs, round(passes, 2)))
    return tuple(rungs)


def with_effort(recipe: Recipe, tokens: int, distill_tokens: int, distill_epochs: int) -> Recipe:
    """Return a recipe of so many calibration tokens, those of them for the closed form, and epochs of distillation."""
    return replace(
        recipe,
        calibration=replace(recipe.calibration, tokens=tokens),
        distill=replace(recipe.distill, tokens=distill_tokens, epochs=distill_epochs),
    )


def _least_recovery(recipe: Recipe) -> Recipe:
    """Return a recipe with a single step of recovery."""
    return replace(recipe, recover=replace(recipe.recover, steps=1, checks=1))


def _one_epoch(recipe: Recipe) -> Recipe:
    """Return a recipe with one epoch of recovery."""
    return replace(recipe, recover=replace(recipe.recover, epochs=1, steps=None))

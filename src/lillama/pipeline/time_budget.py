"""Time as a budget: how much calibration text, distillation and recovery fit into it.

Tokens and epochs of distillation are chosen before the work, from what the stages say that they cost. Those figures err by
a factor of two, so they take a part of the time only; recovery takes what is left of it, by the seconds that its own steps
take here. What was chosen is part of what a run is, and a resumed run follows it.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lillama.errors import RecipeError
from lillama.pipeline.estimate import matmul_rate, seconds_of_stages
from lillama.pipeline.job import Job, retime_job
from lillama.pipeline.time_ladder import EXPORT, MOST_EPOCHS, choose
from lillama.recipes.options import TimeLimit
from lillama.recipes.recipe import Recipe, load_recipe
from lillama.recovery.config import RecoveryConfig
from lillama.runs.run_dir import RunDir
from lillama.system.resources import duration

logger = logging.getLogger(__name__)

LEAST_STEPS = 4  # fewer bring nothing
STEPS_A_CHECK = 8  # a check on the held-out sequences takes as long as one to three steps
OTHERS = 6  # checks that the start, the search for a rate and the measuring of the finished model take as long as
WITH_HEAD = 1.5  # times a forward pass through the blocks: with the head, and over longer windows

STEPS = "recovery steps"  # name of the decision in the run folder


@dataclass(frozen=True)
class Deadline:
    """When a command should end.

    Attributes:
        at: in seconds of `time.monotonic`.
        seconds: that there were for the whole command.
        measured: tokens of the texts on which perplexity is measured in the end.
        most_epochs: of recovery.
    """

    at: float
    seconds: float
    measured: int = 0
    most_epochs: int = MOST_EPOCHS

    def steps(self, step: float, check: float, checks: int, forward: float, most: int) -> int:
        """Return the optimiser steps of a recovery that end in time.

        Args:
            step: seconds of an optimiser step.
            check: seconds of a check on the held-out sequences.
            checks: how many there will be after the start, at most.
            forward: seconds a token of a forward pass of the original's blocks.
            most: steps that are wanted at all.
        """
        left = self.at - time.monotonic() - EXPORT * self.seconds - 2 * WITH_HEAD * forward * self.measured

        def too_many(steps: int) -> bool:
            return steps * step + (checks_of(steps, checks) + OTHERS) * check > left

        steps = bisect_left(range(most + 1), True, key=too_many) - 1
        return steps if steps >= LEAST_STEPS else 0


def fit_job(job: Job, limit: TimeLimit, run: Path, restart: bool) -> Job:
    """Return a job that fits into some time; an unfinished run in the folder has chosen already.

    Args:
        job: all else of it stays; it comes back itself where nothing had to be chosen.
        limit: of the whole command.
        run: run folder, which need not exist.
        restart: whether what lies there is forgotten.
    """
    begun = None if restart else RunDir(run).identity
    if begun is not None and begun.get("time") == asdict(limit):
        return replace(retime_job(job, _as_begun(job.recipe, begun)), limit=limit)
    if not limit.asked and begun is not None:
        return job  # it was begun without a limit
    rate = matmul_rate(job.device, job.teacher.dtype)
    whole, most = cost_of(job, job.recipe, rate), None
    if not limit.asked:
        if whole <= limit.seconds:
            return job
        most = job.recipe.calibration.tokens
        logger.warning(
            "the recipe default would take about %s here; %s is taken: --time says otherwise, --tokens %d takes all of it",
            *(duration(seconds) for seconds in (whole, limit.seconds)),
            most,
        )
    recipe = choose(job.recipe, limit.seconds, lambda one: cost_of(job, one, rate), job.plan.spec.kind.stacks, most)
    logger.info(
        "time: %d calibration tokens, %s of them for the closed form, %d epochs of distillation, recovery in what is left",
        recipe.calibration.tokens,
        recipe.distill.tokens,
        recipe.distill.epochs,
    )
    return replace(retime_job(job, recipe), limit=limit)


def _as_begun(recipe: Recipe, begun: Mapping[str, Any]) -> Recipe:
    """Return a recipe with the effort of a run that was begun; as it is where the run's own cannot be read."""
    try:
        old = begun["recipe"]
        distill = {key: old["distill"][key] for key in ("tokens", "epochs")}
        return load_recipe(recipe, {"calibration": {"tokens": old["calibration"]["tokens"]}, "distill": distill})
    except (KeyError, TypeError, RecipeError):
        return recipe  # which is another run's then, and refused as such


def deadline_of(limit: TimeLimit, started: float, recipe: Recipe, measured: int) -> Deadline:
    """Return when a command should end that began at an instant of `time.monotonic`; `measured` as of `Deadline`."""
    epochs = MOST_EPOCHS if limit.asked else recipe.recover.epochs
    return Deadline(started + limit.seconds, limit.seconds, measured, epochs)


def cost_of(job: Job, recipe: Recipe, rate: float) -> float:
    """Return the estimated seconds of a recipe."""
    rows = job.machine.rows(recipe.calibration.seq_len, job.device)
    return seconds_of_stages(job.plan, recipe, job.teacher.dtype.itemsize, rows, rate, job.open_ranks, job.memory)


def with_steps(config: RecoveryConfig, run_dir: RunDir) -> RecoveryConfig:
    """Return a recovery with the steps that a run decided on by its time, if it did; few steps are looked at less often."""
    steps = run_dir.decided(STEPS)
    if steps is None:
        return config
    return replace(config, steps=steps, checks=checks_of(steps, config.checks))


def checks_of(steps: int, most: int) -> int:
    """Return how often the held-out sequences are looked at in so many steps."""
    return min(most, max(2, steps // STEPS_A_CHECK))

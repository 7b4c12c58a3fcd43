"""Time as a budget: how much calibration text, distillation and recovery fit into it.

Tokens and epochs of distillation are chosen before the work, from what the stages say that they cost. Those figures err by
a factor of two, so they take a part of the time only; recovery takes what is left of it, by the seconds that its own steps
take here. What was chosen is noted in the run folder, and a resumed run follows it.
"""

import logging
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from lillama.errors import DamagedError
from lillama.pipeline.estimate import matmul_rate, seconds_of_stages
from lillama.pipeline.job import Job, retime_job
from lillama.pipeline.time_ladder import EXPORT, choose, unrecovered, with_effort
from lillama.recipes.recipe import Recipe
from lillama.runs.run_dir import RunDir

logger = logging.getLogger(__name__)

LEAST_STEPS = 4  # fewer bring nothing

CHOICE, STEPS = "time", "recovery steps"  # names of the decisions in the run folder


@dataclass(frozen=True)
class Deadline:
    """When a command should end.

    Attributes:
        at: in seconds of `time.monotonic`.
        seconds: that there were for the whole command.
        measured: tokens of the texts on which perplexity is measured in the end.
    """

    at: float
    seconds: float
    measured: int = 0

    def steps(self, step: float, check: float, checks: int, forward: float, most: int) -> int:
        """Return the optimiser steps of a recovery that end in time.

        Args:
            step: seconds of an optimiser step.
            check: seconds of a check on the held-out sequences.
            checks: how many there will be after the start.
            forward: seconds a token of a forward pass of the original.
            most: steps that are wanted at all.
        """
        left = self.at - time.monotonic() - EXPORT * self.seconds - 2 * forward * self.measured
        steps = min(math.floor((left - (checks + 2) * check) / step), most)
        return steps if steps >= LEAST_STEPS else 0


def fit_job(job: Job, seconds: float, run: Path, restart: bool) -> Job:
    """Return a job that fits into some time; an unfinished run in the folder has chosen already.

    Args:
        job: all else of it stays.
        seconds: of the whole command.
        run: run folder, which need not exist.
        restart: whether what lies there is forgotten.
    """
    known = None if restart else _noted(run)
    if known is not None and known["seconds"] == seconds:
        return retime_job(job, with_effort(job.recipe, known["tokens"], known["distill_epochs"]))
    rate = matmul_rate(job.device, job.teacher.dtype)
    return retime_job(job, choose(job.recipe, seconds, lambda one: cost_of(job, unrecovered(one), rate)))


def note_choice(run_dir: RunDir, recipe: Recipe, seconds: float) -> None:
    """Write down what was chosen, for a run that goes on."""
    tokens, epochs = recipe.calibration.tokens, recipe.distill.epochs
    run_dir.decision(CHOICE, {"seconds": seconds, "tokens": tokens, "distill_epochs": epochs})
    logger.info("time: %d calibration tokens, %d epochs of distillation, recovery in what is left", tokens, epochs)


def cost_of(job: Job, recipe: Recipe, rate: float) -> float:
    """Return the estimated seconds of a recipe."""
    rows = job.machine.rows(recipe.calibration.seq_len, job.device)
    return seconds_of_stages(job.plan, recipe, job.teacher.dtype.itemsize, rows, rate, job.open_ranks, job.memory)


def with_steps(recipe: Recipe, run_dir: RunDir) -> Recipe:
    """Return the recipe with the steps of recovery that a run decided on by its time, if it did."""
    steps = run_dir.decided(STEPS)
    return recipe if steps is None else replace(recipe, recover=replace(recipe.recover, steps=steps))


def _noted(run: Path) -> dict[str, int] | None:
    try:
        return RunDir(run).decided(CHOICE)
    except (DamagedError, OSError):
        return None  # opening the run names what is damaged

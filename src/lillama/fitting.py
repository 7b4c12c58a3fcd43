"""The smallest model within a bound on the loss, and the curve that its search begins with."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from lillama.allocation import measured_spectra
from lillama.errors import BudgetError, OutputError, RecipeError
from lillama.files import Claim, claimed
from lillama.goals import smallest_within
from lillama.making import Order, lesson_of, made
from lillama.model.spec import ModelSpec
from lillama.prepare import Planned, plan, prepared
from lillama.ranks.adaptive import Adaptive
from lillama.ranks.plan import RankPlan
from lillama.ranks.spectra import Spectra
from lillama.recipe import Recipe
from lillama.result import Result, refuse_foreign
from lillama.run import MARKER, opened

SHOWN = tuple(round(0.95 - 0.05 * index, 2) for index in range(14))


def smallest(order: Order, most: float) -> Result:
    """Make models until one is within the bound on the loss; the smallest of these becomes the result."""
    with claimed(order.out) as claim:
        refuse_foreign(order.out)
        return _smallest(order, most, claim)


def _smallest(order: Order, most: float, claim: Claim) -> Result:
    if most <= 0:
        raise RecipeError(f"max-loss is {most:g}; give nats a token above 0, for example 0.02")
    if (order.run / MARKER).is_file():
        raise OutputError(f"{order.run}: holds a run of one size; give --max-loss another folder with --run")
    found: dict[float, Result] = {}

    def attempt(keep: float) -> float:
        name = f"keep-{keep:.4f}"
        inner = replace(order, out=order.run / f"{name}-model", run=order.run / name,
                        recipe=replace(order.recipe, keep=keep, bytes=None))  # fmt: skip
        found[keep] = made(inner)
        return found[keep].held_out.rise

    order.run.mkdir(parents=True, exist_ok=True)
    lent = order.run / "spectra"
    spec, spectra = measured(replace(order, run=lent))
    order = replace(order, borrowed=lent)

    def predicted(keep: float) -> float:
        return _rise(spec, replace(order.recipe, keep=keep, bytes=None), spectra)

    keep, _ = smallest_within(most, predicted, attempt)
    with claim.folder() as folder:
        shutil.copytree(found[keep].path, folder, dirs_exist_ok=True)
        refuse_foreign(order.out)
    return replace(found[keep], path=order.out, seconds=sum(result.seconds for result in found.values()))


def preview(order: Order) -> Planned:
    """Return the ranks that the spectra of the weights lead to, and the loss that they predict for every size."""
    planned = plan(order.model, recipe=order.recipe, machine=order.machine)
    with TemporaryDirectory(prefix="lillama-") as folder:
        spec, spectra = measured(replace(order, run=Path(folder) / "run"))
    rises = {keep: _rise(spec, replace(order.recipe, keep=keep, bytes=None), spectra) for keep in SHOWN}
    curve = tuple((keep, rise) for keep, rise in rises.items() if math.isfinite(rise))
    return replace(planned, plan=_ranks(spec, planned.recipe, spectra), outline=False, curve=curve)


def measured(order: Order) -> tuple[ModelSpec, Spectra]:
    """Measure the spectra of a model; nothing but the run folder is written."""
    job = prepared(order.model, order.recipe, order.recipe_name, None, order.machine)
    with opened(order.run, job.identity(), order.restart) as run:
        return job.plan.spec, measured_spectra(lesson_of(job, run, order))


def _rise(spec: ModelSpec, recipe: Recipe, spectra: Spectra) -> float:
    """Return the rise of the loss that is predicted for a recipe's size, in nats a token; inf if it is unreachable."""
    try:
        return spectra.rise(_ranks(spec, recipe, spectra))
    except BudgetError:
        return math.inf


def _ranks(spec: ModelSpec, recipe: Recipe, spectra: Spectra) -> RankPlan:
    allocate = recipe.ranks
    if isinstance(allocate, Adaptive):
        return allocate(spec, recipe.keep, recipe.scope, recipe.storage, spectra, recipe.bytes)
    return allocate(spec, recipe.keep, recipe.scope, recipe.storage)

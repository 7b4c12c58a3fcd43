"""The smallest model within a bound on the loss, and the curve that its search begins with."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from lillama.errors import BudgetError, OutputError, RecipeError
from lillama.model.spec import ModelSpec
from lillama.pipeline.bisection import smallest_within
from lillama.pipeline.compress import Target, claim_target, compress_model, open_context
from lillama.pipeline.job import Job, Planned, resize_job
from lillama.pipeline.rank_selection import measure_spectra
from lillama.ranks.adaptive import Adaptive
from lillama.ranks.bits import MixedBits
from lillama.ranks.plan import RankPlan
from lillama.ranks.spectra import Spectra
from lillama.recipes.recipe import Recipe
from lillama.runs.result import Result, refuse_foreign
from lillama.runs.run_dir import MARKER, RunDir, open_run
from lillama.system.progress import Report

SHOWN = tuple(round(0.95 - 0.05 * index, 2) for index in range(14))


def refuse_search(most: float, run: Path) -> None:
    """Refuse a search whose bound makes no sense, or whose run folder is that of one model.

    Args:
        most: largest rise of the loss, in nats a token.
        run: folder for the runs of the search.
    """
    if not (math.isfinite(most) and most > 0):
        raise RecipeError(f"max-loss is {most:g}; give nats a token above 0, for example 0.02")
    if (run / MARKER).is_file():
        raise OutputError(f"{run}: holds a run of one size; give --max-loss another folder with --run")


def search_keep(job: Job, recipe: Recipe, target: Target, most: float, report: Report) -> Result:
    """Make models until one is within a bound on the loss; the smallest of these becomes the result.

    Args:
        job: at any size; model, calibration and machine are taken from it.
        recipe: as it was asked for, its size left open.
        target: where the result goes; in its run folder each attempt has a folder of its own.
        most: largest rise of the loss on the held-out calibration sequences, in nats a token.
        report: told about progress.
    """
    found: dict[float, Result] = {}
    target.run.mkdir(parents=True, exist_ok=True)
    lent, spec = RunDir(target.run / "spectra"), job.plan.spec
    spectra = _measure(job, lent.path, target.restart, report)

    def attempt(keep: float) -> float:
        run = target.run / f"keep-{keep:.4f}"
        with claim_target(run.with_name(f"{run.name}-model"), run, target.restart, target.texts) as inner:
            found[keep] = compress_model(resize_job(job, _at(spec, recipe, keep)), inner, report, lent)
        return found[keep].held_out.rise

    keep, _ = smallest_within(most, lambda keep: _rise(spec, _at(spec, recipe, keep), spectra), attempt)
    with target.claim.folder() as folder:
        shutil.copytree(found[keep].path, folder, dirs_exist_ok=True)
        refuse_foreign(target.out)
    return replace(found[keep], path=target.out, seconds=sum(result.seconds for result in found.values()))


def preview_ranks(job: Job, planned: Planned, recipe: Recipe, report: Report) -> Planned:
    """Return the ranks that the spectra of the weights lead to, and the loss that they predict for every size."""
    with TemporaryDirectory(prefix="lillama-") as folder:
        spec, spectra = job.plan.spec, _measure(job, Path(folder) / "run", False, report)
    rises = {keep: _rise(spec, _at(spec, recipe, keep), spectra) for keep in SHOWN}
    curve = tuple((keep, rise) for keep, rise in rises.items() if math.isfinite(rise))
    ranks = _allocate(spec, planned.recipe, spectra)
    return replace(planned, plan=ranks, outline=False, curve=curve, rise=spectra.rise(ranks))


def _measure(job: Job, run: Path, restart: bool, report: Report) -> Spectra:
    """Measure the spectra of a model; nothing but the run folder is written."""
    with open_run(run, job.identity(), restart) as run_dir:
        return measure_spectra(open_context(job, run_dir, report))


def _at(spec: ModelSpec, recipe: Recipe, keep: float) -> Recipe:
    """Return a recipe of another size: a share of the numbers, or where bits are chosen of the bytes."""
    return replace(recipe, keep=keep, bytes=int(keep * spec.nbytes) if isinstance(recipe.ranks, MixedBits) else None)


def _rise(spec: ModelSpec, recipe: Recipe, spectra: Spectra) -> float:
    """Return the rise of the loss that is predicted for a recipe's size, in nats a token; inf if it is unreachable."""
    try:
        return spectra.rise(_allocate(spec, recipe, spectra))
    except BudgetError:
        return math.inf


def _allocate(spec: ModelSpec, recipe: Recipe, spectra: Spectra) -> RankPlan:
    allocate = recipe.ranks
    if isinstance(allocate, Adaptive | MixedBits):
        return allocate(spec, recipe.keep, recipe.scope, recipe.storage, spectra, recipe.bytes)
    return allocate(spec, recipe.keep, recipe.scope, recipe.storage)

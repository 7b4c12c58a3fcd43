"""What a compression will need: memory, disk and time, from what each stage says that it costs."""

import time
from dataclasses import dataclass

import torch

from lillama.distill.cost import distillation_cost
from lillama.model.work import StageCost, Work
from lillama.moments.cost import gradients_cost, moments_fit, rounding_cost
from lillama.ranks.adaptive import Adaptive
from lillama.ranks.bits import MixedBits
from lillama.ranks.cost import comparison_cost
from lillama.ranks.plan import RankPlan
from lillama.recipes.recipe import Recipe
from lillama.recovery.cost import recovery_cost
from lillama.system.memory import MemoryBudget

TRIAL_SIZE, TRIAL_SECONDS = 1024, 0.2
EFFICIENCY = 0.6  # of the measured matmul rate that a training step is assumed to reach
WRITING = 0.25  # of the measured rate that a model reaches while it writes
FINISHED_BYTES = 4  # a parameter in the file of a finished block
NO_MEMORY = MemoryBudget(0, 0)


@dataclass(frozen=True)
class Estimate:
    """What a compression will need.

    Attributes:
        memory_bytes: peak on the device, without activations between blocks.
        activation_bytes: activations between blocks, in memory or on disk.
        disk_bytes: result and run folder.
        flops: floating-point operations.
        seconds: at the matmul rate measured just now, None if it was not asked for.
    """

    memory_bytes: int
    activation_bytes: int
    disk_bytes: int
    flops: int
    seconds: float | None


def estimate(
    plan: RankPlan,
    recipe: Recipe,
    itemsize: int,
    micro_batch: int,
    rate: float | None = None,
    *,
    open_ranks: bool = True,
    memory: MemoryBudget = NO_MEMORY,
) -> Estimate:
    """Estimate what a compression by this plan will need: the most that a stage takes, and the time of all.

    Args:
        plan: ranks of the model's linears; of about the final size where they are still open.
        recipe: what is computed.
        itemsize: bytes of a weight or activation in memory.
        micro_batch: sequences that are computed at once.
        rate: floating-point operations a second, from `matmul_rate`.
        open_ranks: whether a recipe that takes ranks from the weights may do so; false where a file gives them.
        memory: that there is; moments that find no room in it are computed again.
    """
    spectra = open_ranks and recipe.ranks.needs_spectra
    work = Work(
        spec=plan.spec,
        ranks=plan.ranks,
        shapes=plan.shapes,
        tokens=min(recipe.calibration.tokens, recipe.distill.tokens or recipe.calibration.tokens),
        recovered=recipe.calibration.tokens,
        held_out=round(recipe.distill.held_out * recipe.calibration.tokens),
        seq_len=recipe.calibration.seq_len,
        itemsize=itemsize,
        micro_batch=micro_batch,
        gradients=spectra or recipe.init.needs_gradient,
        moments_kept=spectra and moments_fit(plan.spec, memory.moments),
        mixes=isinstance(recipe.ranks, MixedBits),
        rounded=frozenset(f"{block.name}.{name}" for block in plan.spec for name in plan.rounded_within(block)),
        narrows=spectra and isinstance(recipe.ranks, Adaptive) and recipe.ranks.narrow and bool(plan.spec.ffns),
    )
    stages = list_stages(work, recipe, spectra)
    flops = round(sum(stage.flops for stage in stages))
    finished = FINISHED_BYTES * sum(block.kept_params for block in work.trained)
    return Estimate(
        memory_bytes=max((stage.memory for stage in stages), default=0),
        activation_bytes=max((stage.activations for stage in stages), default=0),
        disk_bytes=plan.kept_bytes + finished + max((stage.disk for stage in stages), default=0),
        flops=flops,
        seconds=None if rate is None else flops / (EFFICIENCY * rate),
    )


def seconds_of_stages(
    plan: RankPlan,
    recipe: Recipe,
    itemsize: int,
    micro_batch: int,
    rate: float,
    open_ranks: bool,
    memory: MemoryBudget,
) -> float:
    """Return the estimated seconds of a recipe, with the text that a model writes for itself; arguments as of `estimate`."""
    needs = estimate(plan, recipe, itemsize, micro_batch, rate, open_ranks=open_ranks, memory=memory)
    written = 0.0 if recipe.calibration.sources else 2.0 * plan.spec.params * recipe.calibration.tokens
    return (needs.seconds or 0.0) + written / (WRITING * rate)


def list_stages(work: Work, recipe: Recipe, spectra: bool) -> list[StageCost]:
    """Return what each stage of a recipe costs; none where nothing is compressed, or all is rounded to the nearest.

    Args:
        work: to be done.
        recipe: what is computed.
        spectra: whether ranks are taken from the spectra of the weights.
    """
    stages = list[StageCost]()
    if work.rounded:
        stages.append(rounding_cost(work))
    if work.gradients and (work.trained or work.mixes):
        stages.append(gradients_cost(work, spectra))
    if not work.trained:
        return stages
    stages.append(distillation_cost(work, recipe.distill, recipe.distill_in(last_stack=True).epochs, recipe.init))
    if isinstance(recipe.ranks, Adaptive) and spectra:
        stages.append(comparison_cost(work, 1 + len(recipe.ranks.mix) + work.narrows))
    if recipe.recover.wanted:
        stages.append(recovery_cost(work, recipe.recover))
    return stages


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure floating-point operations a second of square matrix products, for about 0.2 s."""
    a = torch.randn(TRIAL_SIZE, TRIAL_SIZE, device=device).to(dtype)
    (a @ a).sum().item()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < TRIAL_SECONDS:
        (a @ a).sum().item()
        count += 1
    return 2 * TRIAL_SIZE**3 * count / (time.perf_counter() - start)

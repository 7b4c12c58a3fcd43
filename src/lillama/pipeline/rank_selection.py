"""Ranks or bits from the weights and the calibration text: spectra measured, candidates compared on held-out sequences."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lillama.files.artefacts import save_json
from lillama.lowrank.batching import stacks
from lillama.lowrank.factors import spectrum
from lillama.lowrank.gram import Moments, exact_device
from lillama.lowrank.student import build_student, load_student, narrow_teacher
from lillama.model.spec import BlockSpec
from lillama.moments.cost import moments_fit
from lillama.moments.gradients import PROBED_TOKENS, GradientCache, collect_gradient_moments
from lillama.pipeline.context import RunContext
from lillama.pipeline.narrowing import measure_widths, narrow_ffns
from lillama.pipeline.rounding import measure_rounding
from lillama.ranks.adaptive import Adaptive
from lillama.ranks.bits import MixedBits
from lillama.ranks.candidates import AllocationJson, Candidate
from lillama.ranks.plan import RankPlan
from lillama.ranks.spectra import Spectra, Values
from lillama.ranks.widths import WidthCurve
from lillama.stream.activations import ActivationStore, StoreFactory
from lillama.stream.calls import BlockInputs
from lillama.stream.capture import advance, begin
from lillama.stream.head import Head
from lillama.system.progress import Progress
from lillama.system.resources import trim_memory

logger = logging.getLogger(__name__)

VERSION = 1


def select_ranks(ctx: RunContext) -> RunContext:
    """Return a context whose ranks are final, with the gradients that its initialisation asks for.

    Spectra, candidates and plan are written to the run folder; a resumed run reads them.
    """
    job, run = ctx.job, ctx.run_dir
    open_ranks = job.open_ranks and not run.allocation.is_file()
    if not job.open_ranks:
        job.plan.save(run.plan)
    elif not open_ranks:
        ctx = _with_plan(ctx, RankPlan.load(run.plan, job.plan.spec, job.recipe.storage))
    gradients = None
    lost = (job.open_ranks or bool(job.plan.widths)) and not run.spectra.is_file()
    if open_ranks or lost or (job.recipe.init.needs_gradient and ctx.unfinished):
        gradients = _measure_gradients(ctx)
    if open_ranks:
        assert gradients is not None
        ctx = _with_plan(ctx, _pick_plan(ctx, gradients))
        _forget_other_ranks(ctx)
    if gradients is not None and not job.recipe.init.needs_gradient:
        gradients.remove()
        gradients = None
    return replace(ctx, gradients=gradients)


def _forget_other_ranks(ctx: RunContext) -> None:
    """Remove blocks that were taught by another plan than the one that was made again."""
    run, found = ctx.run_dir, [block for block in ctx.job.plan.spec if ctx.run_dir.has_block(block.index)]
    other = [block.name for block in found if not _made_by_plan(ctx, block)]
    if other:
        logger.warning("%s: taught with other ranks than those of plan.json; all blocks are taught again", other[0])
        run.forget_blocks()


def _made_by_plan(ctx: RunContext, block: BlockSpec) -> bool:
    log = ctx.run_dir.block_log(block.index)
    return log["ranks"] == ctx.ranks(block) and log["widths"] == ctx.widths(block)


def measure_spectra(ctx: RunContext) -> Spectra:
    """Return the spectra of a run's model, measured now if they were not yet."""
    if not ctx.run_dir.spectra.is_file():
        _measure_gradients(ctx).remove()
    return Spectra.load(ctx.run_dir.spectra)


def _with_plan(ctx: RunContext, plan: RankPlan) -> RunContext:
    return replace(ctx, job=replace(ctx.job, plan=plan))


def _measure_gradients(ctx: RunContext) -> GradientCache:
    """Measure gradients, and the spectra if they are not there yet; moments are kept where memory allows."""
    wanted, found = not ctx.run_dir.spectra.is_file(), dict[str, Tensor]()
    ranks, curves, rounding = ctx.job.recipe.ranks, dict[str, WidthCurve](), dict[str, Values]()
    narrows = bool(ctx.job.plan.widths) or (isinstance(ranks, Adaptive) and ranks.narrow)
    blocks, kept = ctx.job.plan.spec.blocks, dict[int, dict[str, Moments]]()
    mixes = isinstance(ranks, MixedBits)
    fits = not mixes and moments_fit(blocks, ctx.job.memory.moments)

    def names(index: int) -> list[str]:
        block = blocks[index]
        needed = wanted or (fits and not ctx.run_dir.has_block(index))
        return [linear.name.removeprefix(f"{block.name}.") for linear in block.linears] if needed else []

    def visit(index: int, block: nn.Module, measured: Mapping[str, Moments]) -> None:
        if fits and measured:
            kept[index] = dict(measured)
        if not wanted:
            return
        if mixes:
            found_here = measure_rounding(block, measured, ctx.job.recipe.storage.group_size)
            rounding.update({f"{blocks[index].name}.{name}": values for name, values in found_here.items()})
            trim_memory()
            return
        weights = {name: block.get_parameter(f"{name}.weight").detach() for name in measured}
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        for names in stacks(shapes, exact_device(ctx.job.device)):
            values = _spectra([weights[name] for name in names], [measured[name] for name in names])
            found.update({f"{blocks[index].name}.{name}": own for name, own in zip(names, values, strict=True)})
        if narrows:
            curves.update(measure_widths(blocks[index], block, measured))
        trim_memory()

    rows = ctx.local_rows.train[: max(1, PROBED_TOKENS // ctx.job.recipe.calibration.seq_len)]
    generator = torch.Generator().manual_seed(ctx.job.recipe.seed)
    gradients = collect_gradient_moments(
        ctx.teacher, ctx.local_batch, rows, ctx.placement(), ctx.job.micro_batch, generator, names, visit, ctx.report
    )
    if wanted:
        singular = {name: values.numpy() for name, values in found.items()}
        Spectra(singular, curves, rounding).save(ctx.run_dir.spectra)
    return replace(gradients, kept=kept)


def _spectra(weights: Sequence[Tensor], measured: Sequence[Moments]) -> list[Tensor]:
    """Return the singular values of weights of one shape, each between the mean second moments at both of its sides.

    A change of the weight raises the loss of a predicted token by what it does to each vector that comes to it.
    """
    if len(weights) == 1:
        found = [spectrum(weights[0], measured[0].inputs, measured[0].gradients)]
    else:
        both = Moments.stack(measured)
        found = list(spectrum(torch.stack(list(weights)), both.inputs, both.gradients))
    return [(values * _scale(own)).cpu() for values, own in zip(found, measured, strict=True)]


def _scale(found: Moments) -> float:
    """Return what turns singular values between sums into those between means, for each token that the model predicts."""
    assert found.inputs is not None and found.gradients is not None
    return math.sqrt(found.share) / math.sqrt(max(1, found.inputs.count) * max(1, found.gradients.count))


def _pick_plan(ctx: RunContext, gradients: GradientCache) -> RankPlan:
    """Return the candidate that is best on the held-out sequences with its initial factors."""
    recipe, spec, spectra = ctx.job.recipe, ctx.job.plan.spec, Spectra.load(ctx.run_dir.spectra)
    if isinstance(recipe.ranks, MixedBits):
        plan = recipe.ranks(spec, recipe.keep, recipe.scope, recipe.storage, spectra, recipe.bytes)
        plan.save(ctx.run_dir.plan)
        save_json(ctx.run_dir.allocation, AllocationJson(version=VERSION, chosen=1.0, candidates=[]))
        return plan
    assert isinstance(recipe.ranks, Adaptive)  # no other allocator leaves ranks open
    tried = recipe.ranks.candidates(spec, recipe.keep, recipe.scope, recipe.storage, spectra, recipe.bytes)
    plans = [plan for _, plan in tried]
    measured = _evaluate_plans(ctx, gradients, plans, spectra.widths)
    found = [
        Candidate(share, plan.keep, spectra.rise(plan), kl, rise, len(plan.widths))
        for (share, plan), (kl, rise) in zip(tried, measured, strict=True)
    ]
    place = min(range(len(found)), key=lambda place: (found[place].kl, found[place].share, found[place].narrower))
    best, chosen = found[place], plans[place]
    if best.share == 0 and len(found) > 1:
        logger.warning("uniform ranks were better than adaptive ones on the held-out calibration tokens, and are taken")
    chosen.save(ctx.run_dir.plan)
    rows = [candidate.as_json() for candidate in found]
    value: AllocationJson = {"version": VERSION, "chosen": best.share, "candidates": rows}
    save_json(ctx.run_dir.allocation, value)
    return chosen


@torch.no_grad()
def _evaluate_plans(
    ctx: RunContext, gradients: GradientCache, plans: list[RankPlan], curves: Mapping[str, WidthCurve]
) -> list[tuple[float, float]]:
    """Return divergence and rise of the loss, in nats a held-out token, of each plan with its initial factors."""
    model, spec, rate = ctx.teacher, ctx.job.plan.spec, ctx.job.micro_batch
    held_out, placement = ctx.batch[ctx.rows.held_out], ctx.placement()
    wanted = ["original", *(f"plan-{n}" for n in range(len(plans)))]
    new = {name: StoreFactory(placement, model.dtype, f"ranks-{name}", len(wanted) + 1) for name in wanted}
    ends = {name: list[ActivationStore]() for name in wanted}  # of the stacks that are done with
    calls: dict[str, BlockInputs] = {}
    for stack in range(len(model.stacks)):
        now: dict[str, ActivationStore] = {}
        for name in wanted:
            calls[name], now[name] = begin(model, held_out, new[name], rate, stack, dict(enumerate(ends[name])))
        for index in model.indices(stack):
            block = spec.blocks[index]
            ctx.report(Progress("ranks", index, len(spec.blocks), block.name))
            _advance(ctx, gradients, block, plans, curves, calls, now)
            trim_memory()
        for name, store in now.items():
            ends[name].append(store)
            if stack + 1 < len(model.stacks):
                calls[name].remove()
    ctx.report(Progress("ranks", len(spec.blocks), len(spec.blocks)))
    head, original = Head(model, model.outside(head=True), calls["original"]), ends["original"][-1]
    found = [head.means(held_out, ends[name][-1], original, rate) for name in wanted]
    for made in (*new.values(), *calls.values()):
        made.remove()
    return [(kl, entropy - found[0][1]) for kl, entropy in found[1:]]


def _advance(
    ctx: RunContext,
    gradients: GradientCache,
    block: BlockSpec,
    plans: list[RankPlan],
    curves: Mapping[str, WidthCurve],
    calls: Mapping[str, BlockInputs],
    now: Mapping[str, ActivationStore],
) -> None:
    """Run a block of the original, and its initial student by every plan, each on its own activations."""
    model, by_name = ctx.teacher, {f"plan-{n}": plan for n, plan in enumerate(plans)}
    teacher, widest = model.block(block.index), _widest(block, plans)
    ffns = {name: narrow_ffns(block, plan.widths_within(block), curves) for name, plan in by_name.items()}
    needed = dict.fromkeys([*widest, *(ffn.outward for some in ffns.values() for ffn in some)])
    found = gradients.moments(block.index, teacher, needed) if needed else {}
    trim_memory()
    state = _factors(ctx, block, teacher, widest, found)
    for name, store in now.items():
        runner = teacher
        if name in by_name:
            template, narrowed = narrow_teacher(model.template(block.index), teacher, ffns[name], found)
            ranks = by_name[name].ranks_within(block)
            cut = _truncate(state, narrowed, ranks)
            runner = load_student(template, ranks, cut, model.device, model.dtype)
        advance(runner, block.index, calls[name], store, store, ctx.job.micro_batch)


def _widest(block: BlockSpec, plans: Iterable[RankPlan]) -> dict[str, int]:
    """Return the largest rank that any plan gives to each linear of a block."""
    ranks = [plan.ranks_within(block) for plan in plans]
    return {
        name: max(plan.get(name, 0) for plan in ranks) for name in sorted({name for plan in ranks for name in plan})
    }


def _factors(
    ctx: RunContext, block: BlockSpec, teacher: nn.Module, widest: Mapping[str, int], found: Mapping[str, Moments]
) -> dict[str, Tensor]:
    """Return the state of a block's student at the largest ranks."""
    generator = torch.Generator().manual_seed(ctx.seed(block))
    template, init = ctx.teacher.template(block.index), ctx.job.recipe.init
    return build_student(template, teacher, widest, init, found, generator).state_dict()


def _truncate(state: Mapping[str, Tensor], teacher: nn.Module, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Return a state at smaller ranks; the leading columns of `left` and rows of `right` are the best there too."""
    dense = teacher.state_dict()
    cut = {name: tensor for name, tensor in state.items() if name in dense and tensor.numel()} | dict(dense)
    for name, rank in ranks.items():
        cut[f"{name}.weight"] = state[f"{name}.weight"]
        cut[f"{name}.left.weight"] = state[f"{name}.left.weight"][:, :rank]
        cut[f"{name}.right.weight"] = state[f"{name}.right.weight"][:rank]
    return cut

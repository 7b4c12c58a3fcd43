"""Ranks from the weights and the calibration text: spectra measured, candidates compared on held-out sequences."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from lillama.artefacts import save_json
from lillama.distill.fisher import PROBED_TOKENS, Fisher, measured
from lillama.distill.prediction import Head
from lillama.estimate import moments_fit
from lillama.lesson import Lesson
from lillama.lowrank.compressed import compressed_copy, restored_copy
from lillama.lowrank.factors import spectrum
from lillama.lowrank.gram import Moments, exact_device
from lillama.lowrank.stacks import stacks
from lillama.model.spec import BlockSpec
from lillama.progress import Progress
from lillama.ranks.adaptive import Adaptive
from lillama.ranks.plan import RankPlan
from lillama.ranks.spectra import Spectra
from lillama.resources import free_memory, trim_memory
from lillama.stream.calls import BlockInputs
from lillama.stream.running import advance, begin
from lillama.stream.store import ActivationStore, Stores

logger = logging.getLogger(__name__)

VERSION = 1


@dataclass(frozen=True)
class Candidate:
    """A rank plan, what is predicted of it, and what was measured with its initial factors, before any teaching.

    Attributes:
        share: of the way from `uniform` to `adaptive` ranks.
        keep: share of the whole model's numbers that it stores.
        predicted: rise of the loss by the spectra, in nats a token.
        kl: divergence from the original's predictions on the held-out sequences, in nats a token.
        rise: of the text's own cross-entropy there, in nats a token.
    """

    share: float
    keep: float
    predicted: float
    kl: float
    rise: float


def decided(lesson: Lesson) -> Lesson:
    """Return a lesson whose ranks are final, with the gradients that its initialisation asks for.

    Spectra, candidates and plan are written to the run folder; a resumed run reads them.
    """
    job, run = lesson.job, lesson.run
    open_ranks = job.open_ranks and not run.allocation.is_file()
    if not job.open_ranks:
        job.plan.save(run.plan)
    elif not open_ranks:
        lesson = _planned(lesson, RankPlan.load(run.plan, job.plan.spec, job.recipe.storage))
    fisher = None
    lost = job.open_ranks and not run.spectra.is_file()
    if open_ranks or lost or (job.recipe.init.needs_gradient and lesson.unfinished):
        fisher = _fisher(lesson)
    if open_ranks:
        assert fisher is not None
        lesson = _planned(lesson, _chosen(lesson, fisher))
        _forget_other_ranks(lesson)
    if fisher is not None and not job.recipe.init.needs_gradient:
        fisher.remove()
        fisher = None
    return replace(lesson, fisher=fisher)


def _forget_other_ranks(lesson: Lesson) -> None:
    """Remove blocks that were taught by another plan than the one that was made again."""
    run, found = lesson.run, [block for block in lesson.job.plan.spec if lesson.run.has_block(block.index)]
    other = [block.name for block in found if run.block_log(block.index)["ranks"] != lesson.ranks(block)]
    if other:
        logger.warning("%s: taught with other ranks than those of plan.json; all blocks are taught again", other[0])
        run.forget_blocks()


def measured_spectra(lesson: Lesson) -> Spectra:
    """Return the spectra of a run's model, measured now if they were not yet."""
    if not lesson.run.spectra.is_file():
        _fisher(lesson).remove()
    return Spectra.load(lesson.run.spectra)


def _planned(lesson: Lesson, plan: RankPlan) -> Lesson:
    return replace(lesson, job=replace(lesson.job, plan=plan))


def _fisher(lesson: Lesson) -> Fisher:
    """Measure gradients, and the spectra if they are not there yet; moments are kept where memory allows."""
    wanted, found = not lesson.run.spectra.is_file(), dict[str, Tensor]()
    blocks, kept = lesson.job.plan.spec.blocks, dict[int, dict[str, Moments]]()
    fits = moments_fit(blocks, free_memory(exact_device(lesson.job.device)))

    def names(index: int) -> list[str]:
        block = blocks[index]
        needed = wanted or (fits and not lesson.run.has_block(index))
        return [linear.name.removeprefix(f"{block.name}.") for linear in block.linears] if needed else []

    def visit(index: int, block: nn.Module, measured: Mapping[str, Moments]) -> None:
        if fits and measured:
            kept[index] = dict(measured)
        if not wanted:
            return
        weights = {name: block.get_parameter(f"{name}.weight").detach() for name in measured}
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        for names in stacks(shapes, exact_device(lesson.job.device)):
            values = _spectra([weights[name] for name in names], [measured[name] for name in names])
            found.update({f"{blocks[index].name}.{name}": own for name, own in zip(names, values, strict=True)})
        trim_memory()

    rows = lesson.rows.train[: max(1, PROBED_TOKENS // lesson.job.recipe.calibration.seq_len)]
    generator = torch.Generator().manual_seed(lesson.job.recipe.seed)
    fisher = measured(lesson.teacher, lesson.batch, rows, lesson.shelf(), lesson.job.micro_batch, generator, names, visit,
                      lesson.report)  # fmt: skip
    if wanted:
        Spectra({name: values.numpy() for name, values in found.items()}).save(lesson.run.spectra)
    return replace(fisher, kept=kept)


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


def _chosen(lesson: Lesson, fisher: Fisher) -> RankPlan:
    """Return the candidate that is best on the held-out sequences with its initial factors."""
    recipe, spec, spectra = lesson.job.recipe, lesson.job.plan.spec, Spectra.load(lesson.run.spectra)
    assert isinstance(recipe.ranks, Adaptive)  # no other allocator leaves ranks open
    plans = recipe.ranks.candidates(spec, recipe.keep, recipe.scope, recipe.storage, spectra, recipe.bytes)
    found = [
        Candidate(share, plans[share].keep, spectra.rise(plans[share]), kl, rise)
        for share, (kl, rise) in zip(plans, _tried(lesson, fisher, list(plans.values())), strict=True)
    ]
    best = min(found, key=lambda candidate: (candidate.kl, candidate.share))
    if best.share == 0 and len(found) > 1:
        logger.warning("uniform ranks were better than adaptive ones on the held-out calibration tokens, and are taken")
    plans[best.share].save(lesson.run.plan)
    rows = [asdict(candidate) for candidate in found]
    save_json(lesson.run.allocation, {"version": VERSION, "chosen": best.share, "candidates": rows})
    return plans[best.share]


@torch.no_grad()
def _tried(lesson: Lesson, fisher: Fisher, plans: list[RankPlan]) -> list[tuple[float, float]]:
    """Return divergence and rise of the loss, in nats a held-out token, of each plan with its initial factors."""
    model, spec, rate = lesson.teacher, lesson.job.plan.spec, lesson.job.micro_batch
    held_out, shelf = lesson.batch[lesson.rows.held_out], lesson.shelf()
    wanted = ["original", *(f"plan-{n}" for n in range(len(plans)))]
    new = {name: Stores(shelf, model.dtype, f"ranks-{name}", len(wanted) + 1) for name in wanted}
    ends = {name: list[ActivationStore]() for name in wanted}  # of the stacks that are done with
    calls: dict[str, BlockInputs] = {}
    for stack in range(len(model.stacks)):
        now: dict[str, ActivationStore] = {}
        for name in wanted:
            calls[name], now[name] = begin(model, held_out, new[name], rate, stack, dict(enumerate(ends[name])))
        for index in model.indices(stack):
            block = spec.blocks[index]
            lesson.report(Progress("ranks", index, len(spec.blocks), block.name))
            _advance(lesson, fisher, block, plans, calls, now)
            trim_memory()
        for name, store in now.items():
            ends[name].append(store)
            if stack + 1 < len(model.stacks):
                calls[name].remove()
    lesson.report(Progress("ranks", len(spec.blocks), len(spec.blocks)))
    head, original = Head(model, model.outside(head=True), calls["original"]), ends["original"][-1]
    found = [head.means(held_out, ends[name][-1], original, rate) for name in wanted]
    for made in (*new.values(), *calls.values()):
        made.remove()
    return [(kl, entropy - found[0][1]) for kl, entropy in found[1:]]


def _advance(
    lesson: Lesson,
    fisher: Fisher,
    block: BlockSpec,
    plans: list[RankPlan],
    calls: Mapping[str, BlockInputs],
    now: Mapping[str, ActivationStore],
) -> None:
    """Run a block of the original, and its initial student by every plan, each on its own activations."""
    model, ranks = lesson.teacher, {f"plan-{n}": _within(block, plan) for n, plan in enumerate(plans)}
    teacher = model.block(block.index)
    state = _widest(lesson, fisher, block, teacher, list(ranks.values()))
    for name, store in now.items():
        runner = teacher
        if name in ranks:
            cut = _cut(state, teacher, ranks[name])
            runner = restored_copy(model.template(block.index), ranks[name], cut, model.device, model.dtype)
        advance(runner, block.index, calls[name], store, store, lesson.job.micro_batch)


def _within(block: BlockSpec, plan: RankPlan) -> dict[str, int]:
    return {name.removeprefix(f"{block.name}."): rank for name, rank in plan.within(block).items()}


def _widest(
    lesson: Lesson, fisher: Fisher, block: BlockSpec, teacher: nn.Module, ranks: list[dict[str, int]]
) -> dict[str, Tensor]:
    """Return a block's student state at the largest rank that any plan gives to each linear."""
    widest = {name: max(plan.get(name, 0) for plan in ranks) for name in {name for plan in ranks for name in plan}}
    widest = {linear: widest[linear] for linear in sorted(widest)}
    found = fisher.moments(block.index, teacher, widest) if widest else {}
    trim_memory()
    generator = torch.Generator().manual_seed(lesson.seed(block))
    template, init = lesson.teacher.template(block.index), lesson.job.recipe.init
    return compressed_copy(template, teacher, widest, init, found, generator).state_dict()


def _cut(state: Mapping[str, Tensor], teacher: nn.Module, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Return a state at smaller ranks; the leading columns of `left` and rows of `right` are the best there too."""
    dense = teacher.state_dict()
    cut = {name: tensor for name, tensor in state.items() if name in dense and tensor.numel()} | dict(dense)
    for name, rank in ranks.items():
        cut[f"{name}.weight"] = state[f"{name}.weight"]
        cut[f"{name}.left.weight"] = state[f"{name}.left.weight"][:, :rank]
        cut[f"{name}.right.weight"] = state[f"{name}.right.weight"][:rank]
    return cut

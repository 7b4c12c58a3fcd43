"""Everything that is checked and decided before work begins: a compression as a value."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import PreTrainedTokenizerBase

from lillama.corpus.sources import Source, check_exists, fingerprint
from lillama.errors import BudgetError, DataError, ResourceError
from lillama.files.atomic import digest
from lillama.model.checkpoint import CheckpointReader
from lillama.model.describe import describe, describe_model, refuse_quantized
from lillama.model.kind import refuse_too_long
from lillama.model.remote import remote_code
from lillama.model.sizes import read_sizes
from lillama.model.source import computed_dtype, load_config, locate
from lillama.model.spec import ModelSpec
from lillama.model.tokenizer import load_tokenizer, tokenizer_hash
from lillama.pipeline.estimate import Estimate, estimate, matmul_rate, seconds_of_stages
from lillama.pipeline.time_ladder import Rung, choose, ladder
from lillama.ranks.bits import MixedBits
from lillama.ranks.plan import RankPlan
from lillama.recipes.options import Machine, Overrides, OverridesDict, TimeLimit, refuse_two_sizes
from lillama.recipes.recipe import Recipe, override, pick_recipe
from lillama.stream.activations import ActivationPlacement
from lillama.stream.model import StreamedModel, open_streamed
from lillama.system.memory import MemoryBudget
from lillama.system.resources import free_disk, pick_device

BISECTIONS = 30


@dataclass(frozen=True)
class Planned:
    """A rank plan and what it takes to carry it out.

    Attributes:
        plan: rank of each linear.
        recipe: that it was made by.
        estimate: memory, disk and time.
        outline: whether `compress` will move budget between linears when it has read the weights.
        curve: rows of keep and predicted rise of the loss, in nats a token; empty without a preview.
        rise: of the loss that is predicted for the plan, in nats a token, before any training; None without a preview.
        ladder: what fits into five minutes, and into more (`--time`).
        limit: of the time that `compress` takes, where it would take more by what the recipe says.
    """

    plan: RankPlan
    recipe: Recipe
    estimate: Estimate
    outline: bool = False
    curve: tuple[tuple[float, float], ...] = ()
    rise: float | None = None
    ladder: tuple[Rung, ...] = ()
    limit: TimeLimit | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the value that `lillama plan --json` prints; `version` counts its breaking changes."""
        spec = self.plan.spec
        return {
            "version": 1,
            "architecture": spec.architecture,
            "recipe": self.recipe.hash,
            "keep": self.plan.keep,
            "outline": self.outline,
            "params": {"dense": spec.params, "kept": self.plan.kept_params},
            "bytes": {"dense": spec.nbytes, "kept": self.plan.kept_bytes},
            "linears": self.plan.rows(),
            "estimate": asdict(self.estimate),
            "curve": [{"keep": keep, "rise": rise} for keep, rise in self.curve],
            "rise": self.rise,
            "ladder": [asdict(rung) for rung in self.ladder],
            "limit": None if self.limit is None else asdict(self.limit),
        }


def plan(
    model: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
    rank_plan: str | Path | None = None,
    machine: Machine | None = None,
    trust_remote_code: bool = False,
    **options: Unpack[OverridesDict],
) -> Planned:
    """Decide the rank of every linear from shapes alone; no weight is read.

    Sizes in bytes are those of the types that the weights are stored in, where weights lie in the model's folder (of their
    files the headers are read); of a model on the hub they are those that its configuration names.

    Args:
        model: local folder or hub id.
        recipe: name, YAML file, or `Recipe`; None is `bits` where `nbytes` are given and no `bits`, else `default`.
        rank_plan: file of a plan to use instead of a new one.
        machine: how it would be computed.
        trust_remote_code: whether code that lies in the model's folder (`auto_map`) may run, as in transformers.
        **options: `keep`, `nbytes`, `tokens`, ..., which replace the recipe's values; see `lillama.recipes.options.Overrides`.

    Raises:
        LillamaError: the model, the recipe or the size cannot be used.

    Examples:
        >>> planned = plan("demo/model", keep=0.6)
        >>> planned.plan.spec.params, 0.595 < planned.plan.keep <= 0.6
        (7999744, True)
        >>> rank = planned.plan["model.layers.0.mlp.up_proj"]  # None would leave it dense
    """
    machine, overrides = machine or Machine(), Overrides.of(**options)
    refuse_two_sizes(keep=overrides.keep, bytes=overrides.nbytes, plan=rank_plan)
    machine.refuse_senseless()
    recipe = pick_recipe(recipe, overrides)
    wanted = override(recipe, overrides)
    for source in wanted.calibration.sources:
        check_exists(source)
    device = pick_device(machine.device)
    with remote_code(trust_remote_code):
        folder = locate(model, weights=False)
        config = load_config(folder)
        refuse_quantized(config)
        if CheckpointReader(folder).complete:
            spec = _describe(open_streamed(folder, device, split_gate_up=wanted.split_gate_up), wanted)
        else:
            spec = describe(config, wanted.targets, wanted.ignore, wanted.split_gate_up)
    ranks, wanted = resolve_budget(spec, wanted, rank_plan)
    dtype = computed_dtype(config, device)
    rows = machine.rows(wanted.calibration.seq_len, device)
    outline = rank_plan is None and wanted.ranks.needs_spectra
    rate, memory = matmul_rate(device, dtype), MemoryBudget.of(device)

    def cost(one: Recipe) -> float:
        return seconds_of_stages(ranks, one, dtype.itemsize, rows, rate, outline, memory)

    limit = TimeLimit.of(None, recipe, overrides)
    if limit is not None and cost(wanted) <= limit.seconds:
        limit = None
    if limit is not None:
        wanted = choose(wanted, limit.seconds, cost, spec.kind.stacks, wanted.calibration.tokens)
    needs = estimate(ranks, wanted, dtype.itemsize, rows, rate, open_ranks=outline, memory=memory)
    if limit is not None:
        needs = replace(needs, seconds=limit.seconds)
    return Planned(ranks, wanted, needs, outline, ladder=ladder(wanted, ranks, cost), limit=limit)


@dataclass(frozen=True)
class Job:
    """A compression that is ready to begin.

    Attributes:
        model: as the user named it.
        recipe: what is computed.
        recipe_name: as the user named it.
        teacher: the original.
        tokenizer: the original's; None if it neither reads nor writes text.
        plan: rank of each linear; while ranks are open, those of the same size by `uniform`.
        open_ranks: whether ranks are still to be decided from the weights.
        machine: how it is computed.
        needs: memory, disk and time.
        memory: that was free when the job was prepared, shared out.
        limit: of its time, which the recipe's tokens and epochs were chosen for; None if it takes what it takes.
    """

    model: str
    recipe: Recipe
    recipe_name: str
    teacher: StreamedModel
    tokenizer: PreTrainedTokenizerBase | None
    plan: RankPlan
    open_ranks: bool
    machine: Machine
    needs: Estimate
    memory: MemoryBudget
    limit: TimeLimit | None = None

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.teacher.device

    @property
    def micro_batch(self) -> int:
        """Sequences that are computed at once."""
        utterance = self.teacher.kind.max_source_positions or 0
        return self.machine.rows(max(self.recipe.calibration.seq_len, utterance), self.device)

    def identity(self) -> dict[str, Any]:
        """Return what makes this run this run: its time, recipe, model, data, ranks; equal identities give equal results."""
        tokenizer = None if self.tokenizer is None else tokenizer_hash(self.tokenizer)
        return {
            "time": None if self.limit is None else asdict(self.limit),
            "recipe": self.recipe.as_dict(),
            "model": {"files": self.teacher.reader.fingerprint(), "tokenizer": tokenizer},
            "data": {_part(source): fingerprint(source) for source in self.recipe.calibration.sources},
            "plan": "by spectra" if self.open_ranks else _digest(self.plan),
        }


def build_job(
    model: str | Path,
    recipe: Recipe,
    machine: Machine,
    rank_plan: str | Path | None = None,
    recipe_name: str = "",
) -> Job:
    """Check model, recipe and machine, and decide the ranks; nothing is written.

    All weights are read once, tensor by tensor, so that a damaged file is found now and not hours later.

    Args:
        model: local folder or hub id.
        recipe: what is computed.
        machine: how it is computed.
        rank_plan: file of a plan to use instead of a new one.
        recipe_name: as the user named it, for the model card.

    Raises:
        LillamaError: something cannot be used; the text says what and how to mend it.
    """
    machine.refuse_senseless()
    device = pick_device(machine.device)
    folder = locate(model)
    config = load_config(folder)
    refuse_quantized(config)
    teacher = open_streamed(folder, device, split_gate_up=recipe.split_gate_up)
    refuse_too_long(recipe.calibration.seq_len, teacher.kind)
    _refuse_silence(teacher, recipe)
    wordless = not teacher.kind.takes_tokens and teacher.kind.stacks == 1
    tokenizer = None if wordless else load_tokenizer(folder)
    ranks, recipe = resolve_budget(_describe(teacher, recipe), recipe, rank_plan)
    open_ranks = rank_plan is None and _open(recipe, ranks)
    for key in teacher.weights.keys:
        teacher.reader.read(key)
    memory = MemoryBudget.of(device)
    needs = _needs(ranks, recipe, teacher, machine, open_ranks, memory)
    return Job(str(model), recipe, recipe_name, teacher, tokenizer, ranks, open_ranks, machine, needs, memory)


def resize_job(job: Job, recipe: Recipe) -> Job:
    """Return a job of another size, its ranks by the recipe: another `keep` or `bytes` than that of the job's own recipe."""
    ranks, recipe = resolve_budget(job.plan.spec, recipe, None)
    open_ranks = _open(recipe, ranks)
    needs = _needs(ranks, recipe, job.teacher, job.machine, open_ranks, job.memory)
    return replace(job, recipe=recipe, plan=ranks, open_ranks=open_ranks, needs=needs)


def retime_job(job: Job, recipe: Recipe) -> Job:
    """Return a job of the same ranks by a recipe of other tokens and epochs."""
    needs = _needs(job.plan, recipe, job.teacher, job.machine, job.open_ranks, job.memory)
    return replace(job, recipe=recipe, needs=needs)


def _needs(
    ranks: RankPlan, recipe: Recipe, teacher: StreamedModel, machine: Machine, open_ranks: bool, memory: MemoryBudget
) -> Estimate:
    rows = machine.rows(recipe.calibration.seq_len, teacher.device)
    return estimate(ranks, recipe, teacher.dtype.itemsize, rows, open_ranks=open_ranks, memory=memory)


def _describe(teacher: StreamedModel, recipe: Recipe) -> ModelSpec:
    """Describe a model with the types that its tensors are stored in."""
    spec = describe_model(teacher.skeleton, recipe.targets, recipe.ignore, recipe.split_gate_up)
    return read_sizes(spec, teacher.weights, teacher.template)


def check_resources(job: Job, out: Path, run: Path, present: int) -> None:
    """Refuse a compression that the machine has no room for.

    Args:
        job: to be done.
        out: folder of the result.
        run: run folder.
        present: bytes that an earlier, unfinished run has written already.

    Raises:
        ResourceError: disk or memory does not suffice.
    """
    result, rest = job.plan.kept_bytes, job.needs.disk_bytes - job.plan.kept_bytes - present
    placement = ActivationPlacement.on(job.device, run, job.machine.activation_memory, job.memory)
    if placement.place(job.needs.activation_bytes) == "disk":
        rest += job.needs.activation_bytes
    needed = {out: result, run: rest} if _disk(out) != _disk(run) else {run: result + rest}
    for folder, nbytes in needed.items():
        if nbytes > free_disk(folder):
            raise ResourceError(
                f"{folder}: {nbytes / 1e6:,.0f} MB of disk are needed for result and run folder, "
                f"{free_disk(folder) / 1e6:,.0f} MB are free; free some, or put OUT or the run folder (--run) on another disk"
            )
    memory = job.needs.memory_bytes
    if job.recipe.distill.schedule == "sequential" and memory > job.memory.device:
        raise ResourceError(
            f"about {memory / 1e6:,.0f} MB of memory are needed on {job.device}, {job.memory.device / 1e6:,.0f} MB are "
            "free; lower --micro-batch or --seq-len, or choose another --device"
        )


def _refuse_silence(teacher: StreamedModel, recipe: Recipe) -> None:
    """Refuse self-calibration of a model that cannot write its own text."""
    if not recipe.calibration.sources and not (teacher.kind.takes_tokens and teacher.kind.causal):
        name = type(teacher.skeleton).__name__
        raise DataError(
            f"{name} cannot write text to be calibrated on; give --calibration files of what it is used for"
        )


def _open(recipe: Recipe, plan: RankPlan) -> bool:
    """Tell whether ranks or bits are still to be decided from the weights, where no file gives them."""
    return recipe.ranks.needs_spectra and (plan.reduces or bool(plan.bits))


def _digest(plan: RankPlan) -> str:
    return digest([dict(plan.ranks), dict(plan.widths), *([dict(plan.bits)] if plan.bits else [])])


def _part(source: Source) -> str:
    """Return what names a source in the identity of a run: two may share a path and differ in the split."""
    split = None if source.split == "train" else source.split
    return ":".join(part for part in (source.path, source.config, split) if part)


def _disk(path: Path) -> int:
    """Return the number of the disk that a path lies on, or will lie on."""
    while not path.exists():
        path = path.parent
    return path.stat().st_dev


def resolve_budget(spec: ModelSpec, recipe: Recipe, rank_plan: str | Path | None) -> tuple[RankPlan, Recipe]:
    """Return the ranks by recipe from shapes alone, or those of a file; and the recipe with the size they lead to."""
    if rank_plan is not None:
        ranks = RankPlan.load(Path(rank_plan), spec, recipe.storage)
        return ranks, replace(recipe, keep=ranks.keep, scope="model", bytes=None)
    if isinstance(recipe.ranks, MixedBits):
        plan = recipe.ranks(spec, 1.0, storage=recipe.storage, nbytes=recipe.bytes)
        return plan, replace(recipe, keep=1.0, scope="model")
    if recipe.bytes is None:
        return recipe.ranks(spec, recipe.keep, recipe.scope, recipe.storage), recipe
    ranks = _within_bytes(spec, recipe, recipe.bytes)
    return ranks, replace(recipe, keep=ranks.keep, scope="model")


def _within_bytes(spec: ModelSpec, recipe: Recipe, most: int) -> RankPlan:
    """Return the largest plan by shapes alone that takes at most so many bytes."""
    low, high, best = 0.0, 1.0, None
    for _ in range(BISECTIONS):
        keep = (low + high) / 2
        try:
            plan = recipe.ranks(spec, keep, "model", recipe.storage)
        except BudgetError:
            low = keep
            continue
        if plan.kept_bytes <= most:
            low, best = keep, plan
        else:
            high = keep
    if best is None:
        raise BudgetError(
            f"bytes {most:,} are not reachable: the original takes {spec.nbytes:,} and no smaller plan "
            "of this kind fits; allow more, or store fewer bits (--bits 8)"
        )
    return best

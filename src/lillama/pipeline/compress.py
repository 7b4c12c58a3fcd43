"""The method on one screen: build the job, select ranks, distill the blocks, recover, round, export and measure."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from jinja2 import TemplateError
from torch import Tensor

from lillama.calibration.pack import CalibrationSet
from lillama.calibration.sample import sample_calibration
from lillama.corpus.texts import read_text
from lillama.errors import DamagedError
from lillama.evaluation.perplexity import score_texts
from lillama.evaluation.tally import refuse_other_models
from lillama.evaluation.windows import Texts, Windows, cut_windows, default_length, name_texts
from lillama.files.atomic import Claim, claim_place, write_json
from lillama.hub.assemble import assemble
from lillama.hub.card import card
from lillama.hub.rights import rights_of
from lillama.model.checkpoint import CheckpointReader
from lillama.model.remote import runs_code
from lillama.model.spec import BlockSpec
from lillama.model.tokenizer import embeddings_of
from lillama.pipeline.context import RunContext
from lillama.pipeline.job import Job, check_resources
from lillama.pipeline.rank_selection import select_ranks
from lillama.pipeline.recovery import recover
from lillama.pipeline.rounding import round_blocks
from lillama.pipeline.schedules import distill_jointly, distill_sequentially
from lillama.pipeline.time_budget import deadline_of, fit_job, with_steps
from lillama.ranks.plan import RankPlan
from lillama.ranks.spectra import Spectra
from lillama.recipes.options import TimeLimit
from lillama.report.card_plot import PLOT, kept_plot
from lillama.runs.result import FILE, Result, Stored, TextPair, file_digests, refuse_foreign
from lillama.runs.run_dir import RunDir, open_run
from lillama.stream.activations import ActivationPlacement, StoreFactory
from lillama.stream.forward import through
from lillama.stream.head import Change, change
from lillama.stream.model import open_streamed
from lillama.system.progress import Report
from lillama.system.resources import peak_memory, save_memory

logger = logging.getLogger(__name__)

SCHEDULES = {"sequential": distill_sequentially, "joint": distill_jointly}


@dataclass(frozen=True)
class Target:
    """Where a compressed model goes, and what is measured on it.

    Attributes:
        out: folder to make, as the user named it.
        claim: of that folder.
        run: run folder.
        restart: whether to forget an earlier run in the run folder.
        texts: name -> text that perplexity is measured on.
        limit: of the time that the whole command may take; None if it takes what it takes.
        started: when the work began, in seconds of `time.monotonic`.
    """

    out: Path
    claim: Claim
    run: Path
    restart: bool
    texts: Mapping[str, str]
    limit: TimeLimit | None = None
    started: float = field(default_factory=time.monotonic)


@contextmanager
def claim_target(
    out: Path, run: Path, restart: bool, texts: Mapping[str, str], limit: TimeLimit | None = None
) -> Iterator[Target]:
    """Claim the folder to make, which must be new or an earlier result, while the work lasts.

    Raises:
        OutputError: another process works on it, or it holds what would be lost.
    """
    with claim_place(out) as claim:
        refuse_foreign(out)
        yield Target(out, claim, run, restart, texts, limit)


def compress_model(job: Job, target: Target, report: Report, lent: RunDir | None = None) -> Result:
    """Make one model: low-rank factors, distilled block by block, then fine-tuned together.

    Args:
        job: what is to be done, checked.
        target: where the result goes.
        report: told about progress.
        lent: run whose calibration tokens and spectra are taken over.
    """
    windows = _cut_texts(job, target.texts)
    fitted = job if target.limit is None else fit_job(job, target.limit, target.run, target.restart)
    check_resources(fitted, target.out, target.run, _size(target.run))
    with open_run(target.run, fitted.identity(), target.restart) as run_dir:
        ctx = open_context(fitted, run_dir, report, lent)
        if fitted.limit is not None:
            measured = sum(text.ids.numel() for text in windows.values())
            ctx = replace(ctx, deadline=deadline_of(fitted.limit, target.started, job.recipe, measured))
        ctx = select_ranks(ctx)
        ctx = distill_blocks(ctx)
        recover(ctx, fitted.recipe.recover)
        round_blocks(ctx)
        return export_model(ctx, target, windows)


def read_texts(texts: Texts) -> dict[str, str]:
    """Return name -> content of text files."""
    return {name: read_text(path) for name, path in name_texts(texts).items()}


def open_context(job: Job, run_dir: RunDir, report: Report, lent: RunDir | None = None) -> RunContext:
    """Return the context of a run; calibration tokens are sampled now if the run folder has none."""
    run_dir.save_spec(job.plan.spec)
    run_dir.note("free memory", asdict(job.memory))
    tokens = _load_tokens(run_dir) or _sample_tokens(job, run_dir, report, lent)
    if tokens.manifest.wanted and len(tokens.ids) == 1:
        logger.warning("there is one calibration sequence only: states are chosen on what they were trained on")
    ctx = RunContext(job, tokens, run_dir, report)
    if not ctx.ample:
        save_memory()
    return ctx


def distill_blocks(ctx: RunContext) -> RunContext:
    """Train each block's factors to reproduce the original's activations; blocks that the run folder has are done.

    Returns:
        the context without the gradients that the initialisation needed.
    """
    if ctx.unfinished and ctx.gradients is None:
        refuse_overflow(ctx)
    if ctx.unfinished:
        SCHEDULES[ctx.job.recipe.distill.schedule](ctx)
    ctx.run_dir.remove_states()
    _warn_of_kept_initialisations(ctx)
    return ctx.drop_gradients()


def export_model(ctx: RunContext, target: Target, windows: Mapping[str, Windows]) -> Result:
    """Write the model folder, measure the model, write its card, and let the folder appear."""
    job, run_dir, plan = ctx.job, ctx.run_dir, ctx.job.plan
    recipe = replace(job.recipe, recover=with_steps(job.recipe.recover, run_dir))

    def compressed(block: BlockSpec) -> Mapping[str, Tensor] | None:
        if ctx.changes(block):
            return ctx.last_state(block)
        return ctx.teacher.block(block.index, stored=True).state_dict() if plan.bits_within(block) else None

    with target.claim.folder() as folder:
        pivots = assemble(
            folder,
            ctx.teacher.weights,
            plan,
            compressed,
            lambda block: run_dir.load_rounded(block.index),
            ctx.template,
            recipe.hash,
            job.machine.shard_bytes,
            runs_code(),
        )
        texts, change = _measure_texts(ctx, folder, windows), _measure_change(ctx, folder)
        seconds, size = time.monotonic() - target.started, _storage_of(folder, plan)
        result = Result(target.out, run_dir.path, plan, size, recipe, texts, change, seconds, peak_memory(), pivots)
        _write_extra(folder / PLOT, lambda: kept_plot(run_dir.path))
        _write_extra(folder / "README.md", lambda: _card(ctx, result))
        write_json(folder / FILE, {**result.as_json(), "files": file_digests(folder)})
        refuse_foreign(target.out)  # once more, for something may have come in the meantime
    try:
        run_dir.save_metrics(result.as_json())
    except OSError as error:
        place = target.out / FILE
        logger.warning("%s: the figures are not noted in the run folder (%s); %s has them", run_dir.path, error, place)
    return result


def refuse_overflow(ctx: RunContext) -> None:
    """Refuse a model whose activations are not finite on the first sequences, before any block is trained.

    Where gradients are measured, all sequences that these are measured on were looked at already.
    """
    new = StoreFactory(ctx.placement(), ctx.teacher.dtype, "looked-at", len(ctx.teacher.stacks))
    tables, _ = through(ctx.teacher, ctx.batch[: ctx.job.micro_batch], new, ctx.job.micro_batch, strict=True)
    for table in (*tables, new):
        table.remove()


def _load_tokens(run_dir: RunDir) -> CalibrationSet | None:
    """Return the tokens that a run has; None if there are none, or damaged ones."""
    if not run_dir.calibration.exists():
        return None
    try:
        return CalibrationSet.load(run_dir.calibration)
    except DamagedError as error:
        logger.warning("%s %s; the tokens are gathered again", error.path, error.what)
        return None


def _sample_tokens(job: Job, run_dir: RunDir, report: Report, lent: RunDir | None) -> CalibrationSet:
    """Sample tokens; where they are others than those that the run's artefacts were made from, these are removed."""
    known, teacher = run_dir.made_from(), job.teacher
    if lent is None:
        tokens = sample_calibration(
            job.recipe.calibration,
            teacher.reader.folder,
            job.tokenizer,
            job.recipe.seed,
            job.device,
            report,
            teacher.skeleton,
        )
    else:
        tokens = CalibrationSet.load(lent.calibration)
    if tokens.seal not in known and run_dir.forget():
        logger.warning("%s: the calibration tokens are not those of before; all is made anew from them", run_dir.path)
    if lent is not None:
        Spectra.load(lent.spectra).save(run_dir.spectra)
    tokens.save(run_dir.calibration)
    return tokens


def _warn_of_kept_initialisations(ctx: RunContext) -> None:
    logs = [ctx.run_dir.block_log(block.index) for block in ctx.blocks if ctx.changes(block)]
    kept = [log["block"] for log in logs if log["steps"] and not log["improved"]]
    if kept:
        logger.warning(
            "%d of %d blocks keep their initialisation, for training did not improve on it (%s); more calibration "
            "tokens may help",
            len(kept),
            len(logs),
            ", ".join(kept),
        )


def _write_extra(file: Path, text: Callable[[], str]) -> None:
    """Write what is there for the reader alone: where that fails the model is none the worse."""
    try:
        content = text()
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, TemplateError) as error:
        logger.warning("%s: left out, for it could not be made (%s: %s)", file.name, type(error).__name__, error)
        return
    file.write_text(content, encoding="utf-8", errors="backslashreplace")


def _card(ctx: RunContext, result: Result) -> str:
    job = ctx.job
    logs = [ctx.run_dir.block_log(block.index) for block in ctx.blocks if ctx.changes(block)]
    return card(
        result,
        base_model=str(Path(job.model).resolve()) if Path(job.model).is_dir() else job.model,
        recipe_name=job.recipe_name,
        manifest=ctx.tokens.manifest,
        rights=rights_of(job.teacher.reader.folder),
        kept_initialisations=sum(bool(log["steps"]) and not log["improved"] for log in logs),
        plot=PLOT,
    )


def _measure_texts(ctx: RunContext, folder: Path, windows: Mapping[str, Windows]) -> tuple[TextPair, ...]:
    """Measure perplexity before and after."""
    if not windows:
        return ()
    placement: ActivationPlacement = ctx.placement()
    before = score_texts(ctx.teacher, windows, placement, ctx.report)
    after = score_texts(open_streamed(folder, ctx.job.device), windows, placement, ctx.report)
    return tuple(TextPair(*pair) for pair in zip(before, after, strict=True))


def _measure_change(ctx: RunContext, folder: Path) -> Change:
    """Measure the finished model on the held-out calibration sequences."""
    batch, rate = ctx.batch[ctx.rows.held_out], ctx.job.micro_batch
    return change(ctx.teacher, open_streamed(folder, ctx.job.device), batch, ctx.placement(), rate)


def _storage_of(folder: Path, plan: RankPlan) -> Stored:
    """Return what a folder stores; numbers of few bits lie several in one, and are those of the plan."""
    reader = CheckpointReader(folder)
    few = any(map(plan.bits_within, plan.spec))
    params = plan.kept_params if few else sum(math.prod(reader.shape(name)) for name in reader.names)
    return Stored(params, sum(reader.nbytes(name) for name in reader.names))


def _cut_texts(job: Job, texts: Mapping[str, str]) -> dict[str, Windows]:
    if not texts:
        return {}
    refuse_other_models(job.teacher)
    length = default_length(job.teacher)
    assert job.tokenizer is not None  # every causal language model has one
    known = embeddings_of(job.teacher.skeleton)
    return {name: cut_windows(name, text, job.tokenizer, length, embeddings=known) for name, text in texts.items()}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0

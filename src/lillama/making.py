"""Make one compressed model: prepare, gather, decide ranks, teach, recover, assemble, measure."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from jinja2 import TemplateError
from torch import Tensor

from lillama.allocation import decided
from lillama.calibration.documents import read_text
from lillama.calibration.gather import gather
from lillama.calibration.pack import TokenBlocks
from lillama.calibration.tokenizer import embeddings_of
from lillama.distill.prediction import Change, change
from lillama.errors import DamagedError
from lillama.evaluation.perplexity import Windows, cut, default_length, named, score_texts
from lillama.evaluation.tally import refuse_other_models
from lillama.files import Claim, claimed, write_json
from lillama.hub.assemble import assemble
from lillama.hub.card import Calibration, CardFacts, Measured, card
from lillama.hub.rights import Rights, rights_of
from lillama.lesson import Lesson
from lillama.model.checkpoint import CheckpointReader
from lillama.model.remote import runs_code
from lillama.model.spec import BlockSpec
from lillama.options import Machine
from lillama.prepare import Job, checked_room, prepared
from lillama.progress import Report
from lillama.publishing import public_recipe
from lillama.ranks.spectra import Spectra
from lillama.recipe import Recipe
from lillama.recovery import Recovered, recover
from lillama.report.still import PLOT, kept_plot
from lillama.resources import peak_memory, save_memory
from lillama.result import FILE, Result, Stored, TextPair, environment, file_digests, refuse_foreign
from lillama.run import RunDir, opened
from lillama.stream.store import Shelf, Stores
from lillama.stream.streamed import open_streamed
from lillama.stream.through import through
from lillama.teach import teach_jointly, teach_sequentially

logger = logging.getLogger(__name__)

TEACH = {"sequential": teach_sequentially, "joint": teach_jointly}


@dataclass(frozen=True)
class Order:
    """What `compress` was asked for, understood.

    Attributes:
        model: local folder or hub id.
        out: folder to make.
        run: run folder.
        recipe: what is computed.
        recipe_name: as the user named it.
        rank_plan: file of a plan to use instead of a new one.
        texts: files on which perplexity is measured.
        restart: forget an earlier run.
        machine: how it is computed.
        report: told about progress.
        borrowed: run folder whose calibration tokens and spectra are taken over.
    """

    model: str | Path
    out: Path
    run: Path
    recipe: Recipe
    recipe_name: str
    rank_plan: str | Path | None
    texts: str | Path | Sequence[str | Path]
    restart: bool
    machine: Machine
    report: Report
    borrowed: Path | None = None


def made(order: Order) -> Result:
    """Make one model."""
    with claimed(order.out) as claim:
        refuse_foreign(order.out)
        return _made(order, claim)


def _made(order: Order, claim: Claim) -> Result:
    start = time.monotonic()
    contents = {name: read_text(path) for name, path in named(order.texts).items()}
    job = prepared(order.model, order.recipe, order.recipe_name, order.rank_plan, order.machine)
    windows, rights = _windows(job, contents), rights_of(job.teacher.reader.folder)
    checked_room(job, order.out, order.run, _size(order.run))
    with opened(order.run, job.identity(), order.restart) as run:
        lesson = lesson_of(job, run, order)
        if not lesson.ample:
            save_memory()
        lesson = decided(lesson)
        if lesson.unfinished and lesson.fisher is None:
            refuse_overflow(lesson)
        if lesson.unfinished:
            TEACH[order.recipe.distill.schedule](lesson)
        run.remove_joint()
        lesson = lesson.initialised()
        _warn_of_kept_initialisations(lesson)
        recover(lesson, order.recipe.recover)
        return _finished(lesson, order.out, claim, windows, start, rights)


def lesson_of(job: Job, run: RunDir, order: Order) -> Lesson:
    """Return what is taught, with calibration tokens that are gathered now if they were not yet."""
    run.save_spec(job.plan.spec)
    tokens = _kept_tokens(run) or _new_tokens(job, run, order)
    if tokens.manifest.wanted and len(tokens.ids) == 1:
        logger.warning("there is one calibration sequence only: states are chosen on what they were trained on")
    return Lesson(job, tokens, run, order.report)


def refuse_overflow(lesson: Lesson) -> None:
    """Refuse a model whose activations are not finite on the first sequences, before any block is taught.

    Where gradients are measured, all sequences that these are measured on were looked at already.
    """
    new = Stores(lesson.shelf(), lesson.teacher.dtype, "looked-at", len(lesson.teacher.stacks))
    tables, _ = through(
        lesson.teacher, lesson.batch[: lesson.job.micro_batch], new, lesson.job.micro_batch, strict=True
    )
    for made in (*tables, new):
        made.remove()


def _kept_tokens(run: RunDir) -> TokenBlocks | None:
    """Return the tokens that a run has; None if there are none, or damaged ones."""
    if not run.calibration.exists():
        return None
    try:
        return TokenBlocks.load(run.calibration)
    except DamagedError as error:
        logger.warning("%s %s; the tokens are gathered again", error.path, error.what)
        return None


def _new_tokens(job: Job, run: RunDir, order: Order) -> TokenBlocks:
    """Gather tokens; where they are others than those that the run's artefacts were made from, these are removed."""
    known = run.made_from()
    if order.borrowed is None:
        tokens = gather(job.recipe.calibration, job.teacher.reader.folder, job.tokenizer, job.recipe.seed, job.device,
                        order.report, job.teacher.skeleton)  # fmt: skip
    else:
        tokens = TokenBlocks.load(RunDir(order.borrowed).calibration)
    if tokens.seal not in known and run.forget():
        logger.warning("%s: the calibration tokens are not those of before; all is made anew from them", run.path)
    if order.borrowed is not None:
        Spectra.load(RunDir(order.borrowed).spectra).save(run.spectra)
    tokens.save(run.calibration)
    return tokens


def _warn_of_kept_initialisations(lesson: Lesson) -> None:
    logs = [lesson.run.block_log(block.index) for block in lesson.blocks if lesson.ranks(block)]
    kept = [log["block"] for log in logs if log["steps"] and not log["improved"]]
    if kept:
        logger.warning(
            "%d of %d blocks keep their initialisation, for training did not improve on it (%s); more calibration "
            "tokens may help",
            len(kept), len(logs), ", ".join(kept),
        )  # fmt: skip


def _finished(
    lesson: Lesson, out: Path, claim: Claim, windows: Mapping[str, Windows], start: float, rights: Rights
) -> Result:
    """Assemble the model folder, measure it, and let it appear."""
    job, run = lesson.job, lesson.run

    def compressed(block: BlockSpec) -> Mapping[str, Tensor] | None:
        if not lesson.ranks(block):
            return None
        recovered = Recovered(run.path).load(block.index)
        return run.load_block(block.index) if recovered is None else recovered

    with claim.folder() as folder:
        teacher, plan = job.teacher, job.plan
        pivots = assemble(
            folder, teacher.weights, plan.spec, plan.factorised, plan.storage, compressed,
            lambda block: teacher.template(block.index), job.recipe.hash, job.machine.shard_bytes, runs_code(),
        )  # fmt: skip
        texts, change = _measured(lesson, folder, windows), _changed(lesson, folder)
        seconds, size = time.monotonic() - start, _stored(folder)
        result = Result(out, run.path, plan, size, job.recipe, texts, change, seconds, peak_memory(), pivots)
        _told(folder / PLOT, lambda: kept_plot(run.path))
        _told(folder / "README.md", lambda: card(_facts(lesson, result, rights)))
        write_json(folder / FILE, result.as_json() | {"files": file_digests(folder)})
        refuse_foreign(out)  # once more, for something may have come in the meantime
    try:
        run.save_metrics(result.as_json())
    except OSError as error:
        logger.warning("%s: the figures are not noted in the run folder (%s); %s has them", run.path, error, out / FILE)
    return result


def _told(file: Path, text: Callable[[], str]) -> None:
    """Write what is there for the reader alone: where that fails the model is none the worse."""
    try:
        content = text()
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, TemplateError) as error:
        logger.warning("%s: left out, for it could not be made (%s: %s)", file.name, type(error).__name__, error)
        return
    file.write_text(content, encoding="utf-8", errors="backslashreplace")


def _measured(lesson: Lesson, folder: Path, windows: Mapping[str, Windows]) -> tuple[TextPair, ...]:
    if not windows:
        return ()
    shelf: Shelf = lesson.shelf()
    before = score_texts(lesson.teacher, windows, shelf, lesson.report)
    after = score_texts(open_streamed(folder, lesson.job.device), windows, shelf, lesson.report)
    return tuple(TextPair(*pair) for pair in zip(before, after, strict=True))


def _stored(folder: Path) -> Stored:
    reader = CheckpointReader(folder)
    params = sum(math.prod(reader.shape(name)) for name in reader.names)
    return Stored(params, sum(reader.nbytes(name) for name in reader.names))


def _changed(lesson: Lesson, folder: Path) -> Change:
    """Measure the finished model on the held-out calibration sequences."""
    batch, rate = lesson.batch[lesson.rows.held_out], lesson.job.micro_batch
    return change(lesson.teacher, open_streamed(folder, lesson.job.device), batch, lesson.shelf(), rate)


def _windows(job: Job, contents: Mapping[str, str]) -> dict[str, Windows]:
    if not contents:
        return {}
    refuse_other_models(job.teacher)
    length = default_length(job.teacher)
    assert job.tokenizer is not None  # every causal language model has one
    known = embeddings_of(job.teacher.skeleton)
    return {name: cut(name, text, job.tokenizer, length, embeddings=known) for name, text in contents.items()}


def _facts(lesson: Lesson, result: Result, rights: Rights) -> CardFacts:
    job, manifest, spec = lesson.job, lesson.tokens.manifest, result.plan.spec
    logs = [lesson.run.block_log(block.index) for block in lesson.blocks if lesson.ranks(block)]
    return CardFacts(
        base_model=str(Path(job.model).resolve()) if Path(job.model).is_dir() else job.model,
        architecture=spec.architecture,
        recipe_name=job.recipe_name,
        recipe_text=yaml.safe_dump(public_recipe(job.recipe.as_dict()), sort_keys=False, allow_unicode=True),
        recipe_hash=job.recipe.hash,
        keep=job.recipe.keep,
        scope=job.recipe.scope,
        params_dense=spec.params,
        params_kept=result.stored.params,
        bytes_dense=spec.nbytes,
        bytes_kept=result.stored.bytes,
        dtype=spec.dtype,
        calibration=Calibration(
            manifest.kind,
            tuple(source.path for source in manifest.sources) or ("written by the model itself",),
            manifest.tokens,
            manifest.seq_len,
        ),
        seed=job.recipe.seed,
        metrics=tuple(_row(pair) for pair in result.texts),
        blocks_compressed=len(logs),
        blocks_kept_initialisation=sum(not log["improved"] for log in logs),
        seconds=result.seconds,
        peak_bytes=result.peak_bytes,
        versions=environment(),
        plot=PLOT,
        license=rights.license,
        languages=rights.languages,
    )


def _row(pair: TextPair) -> Measured:
    before, after = pair.before, pair.after
    return Measured(
        before.name, before.tokens, before.perplexity, after.perplexity, before.bits_per_byte, after.bits_per_byte
    )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0

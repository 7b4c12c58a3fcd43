"""Make one compressed model: prepare, gather, decide ranks, teach, recover, assemble, measure."""

import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import Tensor
from yaml import YAMLError

from lillama.allocation import decided
from lillama.calibration.documents import read_text
from lillama.calibration.gather import gather
from lillama.calibration.pack import TokenBlocks
from lillama.distill.prediction import Change, change
from lillama.errors import OutputError
from lillama.evaluation.perplexity import Windows, cut, default_length, named, score_texts
from lillama.evaluation.tally import refuse_other_models
from lillama.files import atomic_folder, write_json
from lillama.hub.assemble import assemble
from lillama.hub.card import Calibration, CardFacts, Measured, card
from lillama.hub.companions import FOLDERS
from lillama.lesson import Lesson
from lillama.model.checkpoint import CheckpointReader
from lillama.model.spec import BlockSpec
from lillama.prepare import Job, Machine, checked_room, prepared
from lillama.progress import Report
from lillama.recipe import Recipe
from lillama.recovery import Recovered, recover
from lillama.report.still import PLOT, kept_plot
from lillama.resources import peak_memory, save_memory
from lillama.result import FILE, Result, Stored, TextPair, environment
from lillama.run import RunDir, opened
from lillama.stream.store import Shelf
from lillama.stream.streamed import open_streamed
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
    start = time.monotonic()
    refuse_foreign(order.out)
    contents = {name: read_text(path) for name, path in named(order.texts).items()}
    job = prepared(order.model, order.recipe, order.recipe_name, order.rank_plan, order.machine)
    windows = _windows(job, contents)
    checked_room(job, order.out, order.run, _size(order.run))
    with opened(order.run, job.identity(), order.restart) as run:
        lesson = lesson_of(job, run, order)
        if not lesson.ample:
            save_memory()
        lesson = decided(lesson)
        if lesson.unfinished:
            TEACH[order.recipe.distill.schedule](lesson)
        run.remove_joint()
        lesson = lesson.initialised()
        _warn_of_kept_initialisations(lesson)
        recover(lesson, order.recipe.recover)
        return _finished(lesson, order.out, windows, start)


def lesson_of(job: Job, run: RunDir, order: Order) -> Lesson:
    """Return what is taught, with calibration tokens that are gathered now if they were not yet."""
    run.save_spec(job.plan.spec)
    if not (run.calibration / "manifest.json").is_file():
        if order.borrowed is None:
            config, folder = job.recipe.calibration, job.teacher.reader.folder
            found = gather(config, folder, job.tokenizer, job.recipe.seed, job.device, order.report,
                           job.teacher.skeleton)  # fmt: skip
            found.save(run.calibration)
        else:
            lent = RunDir(order.borrowed)
            shutil.copyfile(lent.spectra, run.spectra)
            TokenBlocks.load(lent.calibration).save(run.calibration)
    tokens = TokenBlocks.load(run.calibration)
    if tokens.manifest.wanted and len(tokens.ids) == 1:
        logger.warning("there is one calibration sequence only: states are chosen on what they were trained on")
    return Lesson(job, tokens, run, order.report)


def _warn_of_kept_initialisations(lesson: Lesson) -> None:
    logs = [lesson.run.block_log(block.index) for block in lesson.blocks if lesson.ranks(block)]
    kept = [log["block"] for log in logs if log["steps"] and not log["improved"]]
    if kept:
        logger.warning(
            "%d of %d blocks keep their initialisation, for training did not improve on it (%s); more calibration "
            "tokens may help",
            len(kept), len(logs), ", ".join(kept),
        )  # fmt: skip


def _finished(lesson: Lesson, out: Path, windows: Mapping[str, Windows], start: float) -> Result:
    """Assemble the model folder, measure it, and let it appear."""
    job, run = lesson.job, lesson.run

    def compressed(block: BlockSpec) -> Mapping[str, Tensor] | None:
        if not lesson.ranks(block):
            return None
        recovered = Recovered(run.path).load(block.index)
        return run.load_block(block.index) if recovered is None else recovered

    with atomic_folder(out) as folder:
        teacher, plan = job.teacher, job.plan
        pivots = assemble(
            folder, teacher.weights, plan.spec, plan.factorised, plan.storage, compressed,
            lambda block: teacher.template(block.index), job.recipe.hash, job.machine.shard_bytes,
        )  # fmt: skip
        texts, change = _measured(lesson, folder, windows), _changed(lesson, folder)
        seconds, size = time.monotonic() - start, _stored(folder)
        result = Result(out, run.path, plan, size, job.recipe, texts, change, seconds, peak_memory(), pivots)
        write_json(folder / FILE, result.as_json())
        (folder / PLOT).write_text(kept_plot(run.path), encoding="utf-8")
        (folder / "README.md").write_text(card(_facts(lesson, result)), encoding="utf-8")
    run.save_metrics(result.as_json())
    return result


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
    return {name: cut(name, text, job.tokenizer, length) for name, text in contents.items()}


def _facts(lesson: Lesson, result: Result) -> CardFacts:
    job, manifest, spec = lesson.job, lesson.tokens.manifest, result.plan.spec
    logs = [lesson.run.block_log(block.index) for block in lesson.blocks if lesson.ranks(block)]
    return CardFacts(
        base_model=str(Path(job.model).resolve()) if Path(job.model).is_dir() else job.model,
        architecture=spec.architecture,
        recipe_name=job.recipe_name,
        recipe_text=job.recipe.as_yaml(),
        recipe_hash=job.recipe.hash,
        keep=job.recipe.keep,
        scope=job.recipe.scope,
        params_dense=spec.params,
        params_kept=result.stored.params,
        bytes_dense=spec.params * spec.bytes_per_param,
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
        **_rights(job.teacher.reader.folder),
    )


def _rights(folder: Path) -> dict[str, Any]:
    """Return licence and languages as the original's card tells them."""
    if not (folder / "README.md").is_file():
        return {}
    try:
        data = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.to_dict()
    except (ValueError, UnicodeDecodeError, YAMLError):
        logger.info("%s: its front matter cannot be read; the new card names no licence", folder / "README.md")
        return {}
    languages = data.get("language") or []
    languages = [languages] if isinstance(languages, str) else languages
    return {"license": data.get("license"), "languages": tuple(map(str, languages))}


def _row(pair: TextPair) -> Measured:
    before, after = pair.before, pair.after
    return Measured(
        before.name, before.tokens, before.perplexity, after.perplexity, before.bits_per_byte, after.bits_per_byte
    )


def refuse_foreign(out: Path) -> None:
    """Refuse an `out` that holds something else than an earlier result of ours."""
    if out.exists() and not (out / FILE).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out}: exists and is not an earlier result of lillama; remove it or choose another OUT")
    outer = next((folder for folder in out.resolve().parents if (folder / FILE).is_file()), None)
    if outer is not None:
        raise OutputError(
            f"{out}: lies in {outer}, a result of lillama that would be replaced as a whole; choose another OUT"
        )
    inner = (
        [entry.name for entry in out.iterdir() if entry.is_dir() and entry.name not in FOLDERS] if out.is_dir() else []
    )
    if inner:
        raise OutputError(f"{out}: holds the folder {inner[0]}, which would be lost; move it, or choose another OUT")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0

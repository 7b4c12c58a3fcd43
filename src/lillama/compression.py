"""From a model folder to a smaller one: prepare, gather tokens, teach, assemble, measure."""

import logging
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import Tensor
from yaml import YAMLError

from lillama.calibration.documents import read_text
from lillama.calibration.gather import gather
from lillama.calibration.pack import TokenBlocks
from lillama.errors import OutputError
from lillama.evaluate.perplexity import TextScore, Windows, cut, default_length, named, score_texts
from lillama.files import atomic_folder, write_json
from lillama.hub.assemble import assemble
from lillama.hub.card import Calibration, CardFacts, Measured, card
from lillama.hub.export import FOLDERS
from lillama.model.spec import BlockSpec
from lillama.prepare import Job, Machine, checked_room, prepared, refuse_two_sizes
from lillama.progress import Report, silent
from lillama.ranks.plan import RankPlan
from lillama.recipe import Recipe, chosen, recipe_name
from lillama.resources import peak_memory, shortage_explained
from lillama.run import RunDir, opened
from lillama.stream.store import Shelf
from lillama.stream.streamed import open_streamed
from lillama.teach import Lesson, teach_jointly, teach_sequentially

logger = logging.getLogger(__name__)

RESULT = "lillama.json"
TEACH = {"sequential": teach_sequentially, "joint": teach_jointly}


@dataclass(frozen=True)
class TextPair:
    """One text under the original and under the compressed model."""

    before: TextScore
    after: TextScore


@dataclass(frozen=True)
class Result:
    """A finished compression.

    Attributes:
        path: the compressed model's folder.
        run: the run folder.
        plan: rank of each linear.
        recipe: what was computed.
        texts: perplexities before and after.
        seconds: that this call took; less than the whole if it resumed an earlier one.
        peak_bytes: largest memory of this process.

    Examples:
        >>> from lillama import plan
        >>> planned = plan("demo/model", keep=0.8)
        >>> result = Result(Path("small"), Path("small.run"), planned.plan, planned.recipe, (), 60.0, 500_000_000)
        >>> result.as_json()["params"]
        {'dense': 7999744, 'kept': 6399744}
    """

    path: Path
    run: Path
    plan: RankPlan
    recipe: Recipe
    texts: tuple[TextPair, ...]
    seconds: float
    peak_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Return the value that `lillama compress --json` prints; `version` counts its breaking changes."""
        spec = self.plan.spec
        return {
            "version": 1,
            "path": str(self.path),
            "run": str(self.run),
            "recipe": self.recipe.hash,
            "keep": self.plan.keep,
            "params": {"dense": spec.params, "kept": self.plan.kept_params},
            "bytes": {"dense": spec.params * spec.bytes_per_param, "kept": self.plan.kept_bytes},
            "texts": [
                {
                    "name": pair.before.name,
                    "tokens": pair.before.tokens,
                    "before": _score(pair.before),
                    "after": _score(pair.after),
                }
                for pair in self.texts
            ],
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "environment": environment(),
        }


def compress(
    model: str | Path,
    out: str | Path,
    *,
    keep: float | None = None,
    recipe: str | Path | Recipe = "default",
    calibration: str | Path | Sequence[str | Path] | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    scope: str | None = None,
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    seed: int | None = None,
    rank_plan: str | Path | None = None,
    texts: str | Path | Sequence[str | Path] = (),
    run: str | Path | None = None,
    restart: bool = False,
    machine: Machine | None = None,
    report: Report = silent,
) -> Result:
    """Make a smaller model: factorise its linears and teach each block to reproduce the activations of the original.

    The same call after a kill goes on where it stopped and gives the same bits. `out` appears only when it is complete.

    Args:
        model: local folder or hub id of a model with safetensors weights.
        out: folder to make: an ordinary model folder.
        keep: share of the parameters that remains; by default the recipe's.
        recipe: name, YAML file, or `Recipe`.
        calibration: paths or dataset ids of text; `["self"]`, or nothing, lets the model write it.
        tokens: of calibration.
        seq_len: tokens of a sequence.
        scope: what `keep` is a share of: `model` or `blocks`.
        targets: globs of the linears to factorise.
        ignore: globs of linears to leave dense.
        seed: of every random choice.
        rank_plan: file of a plan to use instead of a new one.
        texts: files on which perplexity is measured before and after.
        run: folder of the run's artefacts; by default `out` with `.run` at the end.
        restart: forget an earlier run in that folder.
        machine: device, memory and file sizes.
        report: told about progress.

    Raises:
        LillamaError: something cannot be used; the text says what and how to mend it.

    Examples:
        >>> from tempfile import mkdtemp
        >>> result = compress("demo/model", mkdtemp(), keep=0.8, tokens=512, seq_len=64, texts=["demo/text.txt"])
        >>> result.plan.keep <= 0.8
        True
        >>> import lillama, transformers
        >>> smaller = transformers.AutoModelForCausalLM.from_pretrained(result.path)
    """
    start = time.monotonic()
    out = Path(out).expanduser()
    refuse_two_sizes(keep, rank_plan)
    wanted = chosen(recipe, keep=keep, scope=scope, targets=targets, ignore=ignore, calibration=calibration,
                    tokens=tokens, seq_len=seq_len, seed=seed)  # fmt: skip
    folder = _run_folder(out, run)
    _refuse_foreign(out)
    with shortage_explained():
        contents = {name: read_text(path) for name, path in named(texts).items()}
        job = prepared(model, wanted, recipe_name(recipe), rank_plan, machine or Machine())
        windows = _windows(job, contents)
        checked_room(job, out, folder, _size(folder))
        with opened(folder, job.identity(), restart) as opened_run:
            lesson = _lesson(job, opened_run, report)
            if lesson.unfinished:
                TEACH[wanted.distill.schedule](lesson)
            opened_run.remove_joint()
            _warn_of_kept_initialisations(lesson)
            return _finished(lesson, out, windows, start)


def environment() -> dict[str, str]:
    """Return the versions that a result depends on."""
    libraries = ("lillama", "torch", "transformers", "safetensors")
    return {name: version(name) for name in libraries} | {"python": platform.python_version()}


def _lesson(job: Job, run: RunDir, report: Report) -> Lesson:
    run.save_spec(job.plan.spec)
    job.plan.save(run.plan)
    if not (run.calibration / "manifest.json").is_file():
        config, folder = job.recipe.calibration, job.teacher.reader.folder
        gather(config, folder, job.tokenizer, job.recipe.seed, job.device, report).save(run.calibration)
    tokens = TokenBlocks.load(run.calibration)
    if len(tokens.ids) == 1:
        logger.warning("there is one calibration sequence only: states are chosen on what they were trained on")
    return Lesson(job, tokens, run, report)


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
        return run.load_block(block.index) if lesson.ranks(block) else None

    with atomic_folder(out) as folder:
        teacher, plan = job.teacher, job.plan
        assemble(folder, teacher.reader, teacher.names, plan.spec, plan.factorised, compressed, job.recipe.hash,
                 job.machine.shard_bytes)  # fmt: skip
        texts = _measured(lesson, folder, windows)
        result = Result(out, run.path, plan, job.recipe, texts, time.monotonic() - start, peak_memory())
        write_json(folder / RESULT, result.as_json())
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


def _windows(job: Job, contents: Mapping[str, str]) -> dict[str, Windows]:
    length = default_length(job.teacher)
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
        params_kept=result.plan.kept_params,
        bytes_dense=spec.params * spec.bytes_per_param,
        bytes_kept=result.plan.kept_bytes,
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


def _score(score: TextScore) -> dict[str, float]:
    return {"perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}


def _run_folder(out: Path, run: str | Path | None) -> Path:
    """Return the place of the run folder, beside `out` if nothing else is wanted."""
    if out.name in ("", ".."):
        raise OutputError(f"{out}: OUT is a folder to make; give it a name")
    folder = Path(run).expanduser() if run is not None else out.with_name(f"{out.name}.run")
    inner, outer = folder.resolve(), out.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise OutputError(f"{folder}: run folder and OUT lie in each other; choose another --run")
    return folder


def _refuse_foreign(out: Path) -> None:
    """Refuse an `out` that holds something else than an earlier result of ours."""
    if out.exists() and not (out / RESULT).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out}: exists and is not an earlier result of lillama; remove it or choose another OUT")
    outer = next((folder for folder in out.resolve().parents if (folder / RESULT).is_file()), None)
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

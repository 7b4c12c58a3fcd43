"""What a result or a run folder holds: every artefact that can be read, and the names of those that cannot."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lillama.calibration.pack import ManifestJson
from lillama.distill.log import BlockLogJson
from lillama.errors import OutputError
from lillama.evaluation.evaluate import EvaluationJson
from lillama.evaluation.speed import BenchmarkJson
from lillama.files.publishing import unescape_markdown
from lillama.model.spec import BlockJson, SpecJson
from lillama.probing.result import ProbeJson, ProbesJson
from lillama.ranks.candidates import AllocationJson
from lillama.ranks.plan import PlanJson, PlannedJson
from lillama.recovery.log import RecoveryJson
from lillama.report.reader import JsonValues, Reader
from lillama.report.schemas import IdentityJson, RecipeJson, RunJson, has
from lillama.runs.result import FILE as RESULT
from lillama.runs.result import ResultJson, TextPairJson
from lillama.runs.run_dir import RunDir

CARD = 1 << 20  # characters of a model card that are read


@dataclass(frozen=True)
class Extra:
    """Files with what the other commands printed as JSON.

    Attributes:
        evaluation: of `lillama evaluate`.
        probes: of `lillama probe`, one or more.
        bench: of `lillama bench`.
    """

    evaluation: Path | None = None
    probes: tuple[Path, ...] = ()
    bench: Path | None = None


def _nothing() -> Any:
    return {}


@dataclass(frozen=True)
class Evidence:
    """All that is known about one compression; what is not there is empty, and any key may be missing.

    Attributes:
        name: for the reader.
        base: name of the original, as the model card tells it.
        metrics: sizes and figures of the finished model.
        run: what the run computes.
        spec: the model's blocks.
        plan: the rank of each linear.
        manifest: where the calibration tokens come from.
        allocation: how ranks were chosen.
        blocks: logs of the finished blocks, in their order.
        recovery: how the recovery went.
        spectra: linear -> its singular values, the largest first.
        evaluation: what `lillama evaluate` found.
        bench: what `lillama bench` found.
        probes: what `lillama probe` found.
        missing: a line for each artefact that should be there and is not, or cannot be read.
    """

    name: str
    base: str = ""
    metrics: ResultJson = field(default_factory=_nothing)
    run: RunJson = field(default_factory=_nothing)
    spec: SpecJson = field(default_factory=_nothing)
    plan: PlanJson = field(default_factory=_nothing)
    manifest: ManifestJson = field(default_factory=_nothing)
    allocation: AllocationJson = field(default_factory=_nothing)
    blocks: tuple[BlockLogJson, ...] = ()
    recovery: RecoveryJson = field(default_factory=_nothing)
    spectra: Mapping[str, JsonValues] = field(default_factory=dict)
    evaluation: EvaluationJson = field(default_factory=_nothing)
    bench: BenchmarkJson = field(default_factory=_nothing)
    probes: tuple[ProbeJson, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def blocks_told(self) -> list[BlockJson]:
        """The blocks of the model, as its description tells them."""
        return self.spec["blocks"] if has(self.spec, "blocks") else []

    @property
    def linears(self) -> list[PlannedJson]:
        """The linears of the model with their ranks."""
        return self.plan["linears"] if has(self.plan, "linears") else []

    @property
    def texts(self) -> list[TextPairJson]:
        """The texts that were measured before and after."""
        return self.metrics["texts"] if has(self.metrics, "texts") else []

    @property
    def finished(self) -> bool:
        """Whether the compressed model exists."""
        return bool(self.metrics)

    @property
    def identity(self) -> IdentityJson:
        """What the run computes."""
        return self.run["identity"] if has(self.run, "identity") else _nothing()

    @property
    def recipe(self) -> RecipeJson:
        """The recipe as the run's identity tells it; empty if it does not."""
        identity = self.identity
        return identity["recipe"] if has(identity, "recipe") else _nothing()


def collect(path: Path, extra: Extra | None = None) -> Evidence:
    """Read what a result's folder or a run folder holds.

    Args:
        path: of either; the other one is found beside it.
        extra: files that lie elsewhere; those of the run folder are found without.

    Raises:
        OutputError: the folder is neither.
    """
    extra = extra or Extra()
    out, run = _places(path)
    reader, places = Reader(), RunDir(run)
    result = reader.json(places.metrics if path == run else out / RESULT, ResultJson, wanted=False)
    lost = not run.is_dir()
    if lost:
        reader.missing.append(f"{run.name}: the run folder is gone, and with it ranks, spectra and losses")
    told = reader.json(places.marker, RunJson, not lost, key="identity")
    known = Evidence(path.name, run=told)
    adaptive = bool(result) and not lost and _by_spectra(known)
    evidence = Evidence(
        path.name,
        _base(out) if result or lost else "",
        metrics=result,
        run=told,
        spec=reader.json(places.spec, SpecJson, not lost, key="blocks"),
        plan=reader.json(places.plan, PlanJson, not lost, key="linears"),
        manifest=reader.json(places.manifest, ManifestJson, not lost, key="tokens"),
        allocation=reader.json(places.allocation, AllocationJson, adaptive),
        recovery=reader.json(places.recovery, RecoveryJson, bool(result) and _recovers(known), key="improved"),
        blocks=tuple(log for file in places.block_logs() if (log := reader.json(file, BlockLogJson, key="block"))),
        spectra=reader.tensors(places.spectra, adaptive),
        evaluation=reader.json(extra.evaluation or places.evaluation, EvaluationJson, extra.evaluation is not None),
        bench=reader.json(extra.bench or places.bench, BenchmarkJson, extra.bench is not None),
        probes=tuple(part for file in extra.probes or places.probes() for part in _probes(reader, file)),
    )
    if not lost and not result:
        _note_unfinished(reader, evidence)
    return replace(evidence, missing=tuple(reader.missing))


def _by_spectra(known: Evidence) -> bool:
    """Tell whether a run's ranks come from its spectra."""
    identity, ranks = known.identity, known.recipe["ranks"] if has(known.recipe, "ranks") else {}
    return has(identity, "plan") and identity["plan"] == "by spectra" and ranks.get("name") == "adaptive"


def _recovers(known: Evidence) -> bool:
    """Tell whether a run ends with a recovery."""
    return has(known.recipe, "recover") and bool(known.recipe["recover"].get("epochs"))


def _places(path: Path) -> tuple[Path, Path]:
    """Return the result's folder and the run folder."""
    if (path / RESULT).is_file():
        beside = path.with_name(f"{path.name}.run")
        return path, beside if beside.is_dir() else _named_folder(path / RESULT, "run") or beside
    run = RunDir(path)
    if run.marker.is_file() or (run.spec.is_file() and run.plan.is_file()):
        beside = path.with_name(path.name.removesuffix(".run"))
        known = path.suffix == ".run" and (beside / RESULT).is_file()
        return beside if known else _named_folder(run.metrics, "path") or beside, path
    if not path.exists():
        raise OutputError(f"{path}: there is no such folder; give a result of lillama or a run folder")
    raise OutputError(f"{path}: neither a result of lillama (no {RESULT}) nor a run folder (no {run.marker.name})")


def _named_folder(file: Path, key: Literal["run", "path"]) -> Path | None:
    """Return the folder that a result's JSON names."""
    found = Reader().json(file, ResultJson)
    told = found[key] if has(found, key) else ""
    return Path(told) if told and Path(told).is_dir() else None


def _probes(reader: Reader, file: Path) -> list[ProbeJson]:
    """Return what one call of `lillama probe` printed: on one benchmark, or on several."""
    found = reader.json(file, ProbesJson, form=lambda value: value if has(value, "results") else {"results": [value]})
    return found["results"] if has(found, "results") else []


def _base(out: Path) -> str:
    """Return the original's name from the heading of the model card."""
    card = out / "README.md"
    if not card.is_file():
        return ""
    try:
        with card.open(encoding="utf-8") as file:
            lines = file.read(CARD).splitlines()
    except (OSError, ValueError):
        return ""
    return next((unescape_markdown(line[2:].rpartition(", ")[0]) for line in lines if line.startswith("# ")), "")


def _note_unfinished(reader: Reader, known: Evidence) -> None:
    total = len(known.blocks_told)
    finished = len(known.blocks)
    reader.missing.append(f"metrics.json: not there; the run is not finished ({finished} of {total} blocks are)")

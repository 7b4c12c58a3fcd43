"""What a result or a run folder holds: every artefact that can be read, and the names of those that cannot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lillama.errors import OutputError
from lillama.files.publishing import unescaped
from lillama.report import shapes
from lillama.report.reader import Json, Reader, Values

RESULT, RUN = "lillama.json", "run.json"
CARD = 1 << 20  # characters of a model card that are read
FILES = (
    ("run", RUN, shapes.Run, "identity"),
    ("spec", "spec.json", shapes.Spec, "blocks"),
    ("plan", "plan.json", shapes.Plan, "linears"),
    ("manifest", "calibration/manifest.json", shapes.Manifest, "tokens"),
)


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


@dataclass(frozen=True)
class Evidence:
    """All that is known about one compression; what is not there is None or empty.

    Attributes:
        name: for the reader.
        base: name of the original, as the model card tells it.
        artefacts: name without suffix -> content of a JSON file of the run.
        blocks: logs of the finished blocks, in their order.
        spectra: linear -> its singular values, the largest first.
        probes: what `lillama probe` found.
        missing: a line for each artefact that should be there and is not, or cannot be read.
    """

    name: str
    base: str = ""
    artefacts: Mapping[str, Json] = field(default_factory=dict)
    blocks: tuple[Json, ...] = ()
    spectra: Mapping[str, Values] = field(default_factory=dict)
    probes: tuple[Json, ...] = ()
    missing: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Json:
        """Return a JSON artefact; empty if there is none."""
        return self.artefacts.get(name, {})

    @property
    def finished(self) -> bool:
        """Whether the compressed model exists."""
        return bool(self["metrics"])

    @property
    def recipe(self) -> Json:
        """The recipe as the run's identity tells it."""
        return dict(self["run"].get("identity", {}).get("recipe", {}))


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
    reader = Reader()
    result = reader.json(run / "metrics.json" if path == run else out / RESULT, shapes.Result, wanted=False)
    if not run.is_dir():
        reader.missing.append(f"{run.name}: the run folder is gone, and with it ranks, spectra and losses")
        found = _extras(reader, run, extra)
        return Evidence(path.name, _base(out), {"metrics": result, **found[0]}, (), {}, found[1], tuple(reader.missing))
    artefacts = {name: reader.json(run / file, shape, key=key) for name, file, shape, key in FILES}
    recipe = artefacts["run"].get("identity", {}).get("recipe", {})
    by_spectra = artefacts["run"].get("identity", {}).get("plan") == "by spectra"
    adaptive = by_spectra and recipe.get("ranks", {}).get("name") == "adaptive"
    tail = bool(result) and bool(recipe.get("recover", {}).get("epochs"))
    artefacts |= {
        "metrics": result,
        "allocation": reader.json(run / "allocation.json", shapes.Allocation, adaptive and bool(result)),
        "recovery": reader.json(run / "recovered" / "log.json", shapes.Recovery, tail, "improved"),
    }
    files = sorted(run.glob("blocks/*.json"))
    blocks = tuple(log for file in files if (log := reader.json(file, shapes.BlockLog, key="block")))
    spectra = reader.tensors(run / "spectra.safetensors", adaptive and bool(result))
    found = _extras(reader, run, extra)
    if not result:
        _note_unfinished(reader, artefacts, len(blocks))
    return Evidence(
        path.name, _base(out) if result else "", artefacts | found[0], blocks, spectra, found[1], tuple(reader.missing)
    )


def _places(path: Path) -> tuple[Path, Path]:
    """Return the result's folder and the run folder."""
    if (path / RESULT).is_file():
        beside = path.with_name(f"{path.name}.run")
        return path, beside if beside.is_dir() else _told(path / RESULT, "run") or beside
    if (path / RUN).is_file() or ((path / "spec.json").is_file() and (path / "plan.json").is_file()):
        beside = path.with_name(path.name.removesuffix(".run"))
        known = path.suffix == ".run" and (beside / RESULT).is_file()
        return beside if known else _told(path / "metrics.json", "path") or beside, path
    if not path.exists():
        raise OutputError(f"{path}: there is no such folder; give a result of lillama or a run folder")
    raise OutputError(f"{path}: neither a result of lillama (no {RESULT}) nor a run folder (no {RUN})")


def _told(file: Path, key: str) -> Path | None:
    """Return the folder that a result's JSON names."""
    told = Reader().json(file, shapes.Result).get(key, "")
    return Path(told) if told and Path(told).is_dir() else None


def _extras(reader: Reader, run: Path, extra: Extra) -> tuple[dict[str, Json], tuple[Json, ...]]:
    """Return what the other commands printed, from the files that were named or lie in the run folder."""
    evaluation, bench = extra.evaluation or run / "evaluation.json", extra.bench or run / "bench.json"
    found = {
        "evaluation": reader.json(evaluation, shapes.Evaluation, extra.evaluation is not None),
        "bench": reader.json(bench, shapes.Bench, extra.bench is not None),
    }
    files: Sequence[Path] = extra.probes or sorted(run.glob("probe*.json"))
    return found, tuple(part for file in files for part in _probes(reader, file))


def _probes(reader: Reader, file: Path) -> list[Json]:
    """Return what one call of `lillama probe` printed: on one benchmark, or on several."""
    found = reader.json(file, shapes.Probes, form=lambda value: value if "results" in value else {"results": [value]})
    return found.get("results", [])


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
    return next((unescaped(line[2:].rpartition(", ")[0]) for line in lines if line.startswith("# ")), "")


def _note_unfinished(reader: Reader, artefacts: Mapping[str, Json], finished: int) -> None:
    total = len(artefacts["spec"].get("blocks", ()))
    reader.missing.append(f"metrics.json: not there; the run is not finished ({finished} of {total} blocks are)")

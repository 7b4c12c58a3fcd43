"""What a finished compression is."""

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path

from pydantic import FiniteFloat
from typing_extensions import TypedDict

from lillama.errors import OutputError
from lillama.evaluation.perplexity import TextScore
from lillama.files.artefacts import Count, Positive, Size
from lillama.files.atomic import file_digest, read_small, resolve_path
from lillama.lowrank.pivot import Pivoting
from lillama.ranks.plan import RankPlan
from lillama.recipes.recipe import Recipe
from lillama.stream.head import Change
from lillama.version import __version__

FILE = "lillama.json"  # in the folder of a result


class SizesJson(TypedDict):
    """A size of the original and of the compressed model."""

    dense: Size
    kept: Size


class LossJson(TypedDict):
    """How well a text is predicted."""

    perplexity: Positive
    bits_per_byte: float


class TextPairJson(TypedDict):
    """A text, measured before and after."""

    name: str
    tokens: int
    before: LossJson
    after: LossJson


class ChangeJson(TypedDict):
    """What became of the predictions on held-out calibration text."""

    kl: FiniteFloat
    rise: FiniteFloat


class PivotsJson(TypedDict):
    """What the pivots of a model are like at their worst."""

    linears: int
    worst: str
    condition: float
    largest_coefficient: float


class ResultJson(TypedDict):
    """What `lillama compress --json` prints; `lillama.json` and `metrics.json` hold it."""

    version: int
    path: str
    run: str
    recipe: str
    keep: FiniteFloat
    params: SizesJson
    bytes: SizesJson
    texts: list[TextPairJson]
    held_out: ChangeJson
    pivots: PivotsJson | None
    seconds: FiniteFloat
    peak_bytes: Count
    environment: dict[str, str]


@dataclass(frozen=True)
class TextPair:
    """One text under the original and under the compressed model."""

    before: TextScore
    after: TextScore

    def as_json(self) -> TextPairJson:
        """Return the value for JSON."""
        before, after = self.before, self.after
        return {"name": before.name, "tokens": before.tokens, "before": _score(before), "after": _score(after)}


@dataclass(frozen=True)
class Stored:
    """What a model's weight files hold.

    Attributes:
        params: numbers, those of the order of rows and of scales among them.
        bytes: that these take.
    """

    params: int
    bytes: int


@dataclass(frozen=True)
class Result:
    """A finished compression.

    Attributes:
        path: the compressed model's folder.
        run: the run folder.
        plan: rank of each linear.
        stored: numbers and bytes of the result's weights, as they stand in its files.
        recipe: what was computed.
        texts: perplexities before and after.
        held_out: what became of the predictions on the held-out calibration sequences.
        seconds: that this call took; less than the whole if it resumed an earlier one.
        peak_bytes: largest memory of this process.
        pivots: full name of a linear -> how well its pivot rows stand for its other rows; empty for the plain form.

    Examples:
        >>> from lillama import plan
        >>> planned = plan("demo/model", keep=0.8)
        >>> stored, change = Stored(6_399_744, 12_799_488), Change(kl=0.02, rise=0.01)
        >>> result = Result(Path("small"), Path("small.run"), planned.plan, stored, planned.recipe, (), change, 60.0, 10**9)
        >>> result.as_json()["params"]
        {'dense': 7999744, 'kept': 6399744}
    """

    path: Path
    run: Path
    plan: RankPlan
    stored: Stored
    recipe: Recipe
    texts: tuple[TextPair, ...]
    held_out: Change
    seconds: float
    peak_bytes: int
    pivots: Mapping[str, Pivoting] = field(default_factory=dict)

    def as_json(self) -> ResultJson:
        """Return the value that `lillama compress --json` prints; `version` counts its breaking changes."""
        spec = self.plan.spec
        return {
            "version": 1,
            "path": str(self.path),
            "run": str(self.run),
            "recipe": self.recipe.hash,
            "keep": self.stored.params / spec.params,
            "params": {"dense": spec.params, "kept": self.stored.params},
            "bytes": {"dense": spec.nbytes, "kept": self.stored.bytes},
            "texts": [pair.as_json() for pair in self.texts],
            "held_out": {"kl": self.held_out.kl, "rise": self.held_out.rise},
            "pivots": _worst(self.pivots),
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "environment": environment(),
        }


def _worst(pivots: Mapping[str, Pivoting]) -> PivotsJson | None:
    """Return what the pivots of a model are like at their worst; None if nothing is stored by pivots."""
    if not pivots:
        return None
    name = max(pivots, key=lambda name: pivots[name].condition)
    largest = max(pivot.largest for pivot in pivots.values())
    return {"linears": len(pivots), "worst": name, "condition": pivots[name].condition, "largest_coefficient": largest}


def environment() -> dict[str, str]:
    """Return the versions that a result depends on."""
    libraries = {name: _version(name) for name in ("torch", "transformers", "safetensors")}
    return {"lillama": __version__} | libraries | {"python": platform.python_version()}


def _version(library: str) -> str:
    """Return a library's version; without metadata, as in an archive, the one that it tells itself."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return str(getattr(import_module(library), "__version__", "unknown"))


def _score(score: TextScore) -> LossJson:
    return {"perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}


def file_digests(folder: Path) -> dict[str, str]:
    """Return name within a folder -> SHA-256 of every file in it, at any depth."""
    files = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def refuse_foreign(out: Path) -> None:
    """Refuse an `out` that holds anything else than an earlier result of ours, as it was written.

    Raises:
        OutputError: what would be lost, by name.
    """
    folder = resolve_path(out)
    if folder.is_mount():
        raise OutputError(f"{out}: a disk is mounted here, which nothing can replace; name a folder in it")
    outer = next((parent for parent in folder.parents if (parent / FILE).is_file()), None)
    if outer is not None:
        raise OutputError(
            f"{out}: lies in {outer}, a result of lillama that would be replaced as a whole; choose another OUT"
        )
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / FILE).is_file():
        raise OutputError(f"{out}: exists and is not an earlier result of lillama; remove it or choose another OUT")
    written = _written_files(folder / FILE)
    if written is None:
        raise OutputError(f"{out / FILE}: does not tell which files lillama wrote; remove {out} or choose another OUT")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            if not any(other.startswith(f"{name}/") for other in written):
                raise OutputError(
                    f"{out}: holds the folder {name}, which would be lost; move it, or choose another OUT"
                )
        elif name not in written and name != FILE:
            raise OutputError(f"{out}: holds {name}, which would be lost; move it, or choose another OUT")
        elif name != FILE and (path.is_symlink() or file_digest(path) != written[name]):
            raise OutputError(
                f"{out}: {name} was changed since lillama wrote it, which would be lost; move it, or choose another OUT"
            )


def _written_files(file: Path) -> dict[str, str] | None:
    """Return the files that a result says it was written with; None if it does not say so."""
    try:
        found = json.loads(read_small(file).decode())["files"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None

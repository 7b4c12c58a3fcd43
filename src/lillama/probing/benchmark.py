"""What a benchmark of minimal pairs is: one YAML file that says how its data are read, averaged and grouped."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError, with_config

from lillama.errors import ProbeError, suggestion
from lillama.files.packaged import package_folder
from lillama.files.yaml_text import read_yaml

Unit = Literal["token", "char", "word", "phoneme"]
ScoreName = Literal["mean", "sum", "penalised"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Columns = Annotated[tuple[str, ...], Field(min_length=1)]


@with_config(extra="forbid")
@dataclass(frozen=True)
class Grouping:
    """How what is averaged last falls into groups.

    Attributes:
        column: whose value names the group; empty: the column of the grouping's own name.
        bands: lower bounds of bands of numbers, ascending; each ends below the next, the last has no end.
        labels: one for each band.
    """

    column: str = ""
    bands: tuple[Finite, ...] = ()
    labels: tuple[str, ...] = ()


@with_config(extra="forbid")
@dataclass(frozen=True)
class Stimuli:
    """Tables with one text in a row, as BabySLM's `gold.csv`, and how rows become pairs.

    Attributes:
        text: columns that may hold the text; the first that is filled in every row does.
        pair: columns that a right text and its wrong text share.
        correct: column that is 1 for a right text and 0 for a wrong one.
        voice: column of the voice; who reads has one, so that a model of text is asked about the first voice alone.
        filename: column that names the text in a file of probabilities.
    """

    text: Columns
    pair: Columns
    correct: str = "correct"
    voice: str = "voice"
    filename: str = "filename"


@with_config(extra="forbid")
@dataclass(frozen=True)
class Benchmark:
    """A set of minimal pairs and the rules by which its authors average.

    Attributes:
        name: of the benchmark.
        files: globs below the data folder: tables (.csv .tsv), JSON lines (.jsonl) or plain lines (.txt).
        good: column of the right text; in a table of trials its log-probability stands in `score GOOD`.
        bad: column of the wrong text.
        pair: columns whose values together name one pair.
        average: levels of averaging; at each, rows equal in these columns become their mean. The overall score is the mean
            of what the last level leaves.
        groups: breakdowns of what the last level leaves; the first is the main one.
        title: what it is, in a line.
        source: where it comes from.
        language: code of the texts' language.
        optional: columns that a file may lack.
        template: what is scored: `{}` stands for the text.
        unit: what `mean` and `penalised` count; words and phonemes are separated by spaces.
        score: how a log-probability becomes the score of a text.
        stimuli: how rows become pairs, where a row holds one text.
        lines: which line of each two is right, in plain lines.
        file_name: regular expression for a file's name without its suffix; its named groups become columns.
    """

    name: str
    files: Columns
    good: str
    bad: str
    pair: Columns
    average: Annotated[tuple[Columns, ...], Field(min_length=1)]
    groups: Mapping[str, Grouping]
    title: str = ""
    source: str = ""
    language: str = ""
    optional: tuple[str, ...] = ()
    template: str = "{}"
    unit: Unit = "token"
    score: ScoreName = "mean"
    stimuli: Stimuli | None = None
    lines: Literal["good first", "bad first"] = "good first"
    file_name: str = field(default="")

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that the rules speak of, the texts' apart."""
        grouped = (grouping.column or name for name, grouping in self.groups.items())
        named = (*self.pair, *(column for level in self.average for column in level), *grouped)
        return tuple(dict.fromkeys(column for column in named if column not in (self.good, self.bad)))

    def as_yaml(self) -> str:
        """Return the benchmark as YAML that `load_benchmark` reads back; what equals its default is left out."""
        tree = _adapter().dump_python(self, mode="json", exclude_defaults=True)
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def benchmark_names() -> list[str]:
    """Return the names of the benchmarks that come with lillama."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in _inside("benchmarks").iterdir() if entry.suffix == ".yaml"
    )


def built_in_sets() -> list[str]:
    """Return the names of those that come with their data."""
    return [name for name in benchmark_names() if any(packaged_data().glob(f"{name}.*"))]


def packaged_data() -> Path:
    """Return the folder of the data that come with lillama."""
    return _inside("data")


def benchmark_file(benchmark: str | Path) -> Path:
    """Return the YAML file of a benchmark, by name or path.

    Raises:
        ProbeError: there is no such benchmark or file.
    """
    names = benchmark_names()
    if str(benchmark) in names:
        return _inside("benchmarks") / f"{benchmark}.yaml"
    if Path(benchmark).is_file():
        return Path(benchmark)
    near = suggestion(str(benchmark), names)
    raise ProbeError(f"benchmark {benchmark}: neither a YAML file nor one of {', '.join(names)}{near}")


def load_benchmark(benchmark: str | Path) -> Benchmark:
    """Read a benchmark, by name or from a YAML file.

    Raises:
        ProbeError: no such benchmark, an unknown or missing key, or a value that makes no sense.

    Examples:
        >>> load_benchmark("babyslm-lexical").average
        (('word', 'voice'), ('word',))
        >>> load_benchmark("blimpp")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        lillama.errors.ProbeError: benchmark blimpp: neither a YAML file nor one of ...; did you mean 'blimp'?
    """
    path = benchmark_file(benchmark)
    tree = read_yaml(path, ProbeError)
    if not isinstance(tree, dict):
        raise ProbeError(f"{path}: a benchmark is a mapping of keys to values, found {type(tree).__name__}")
    return _validate(tree, path)


def _validate(tree: dict[str, Any], path: Path) -> Benchmark:
    try:
        found: Benchmark = _adapter().validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "unexpected_keyword_argument":
            known = [part.name for kind in (Benchmark, Grouping, Stimuli) for part in fields(kind)]
            raise ProbeError(f"{path}: unknown key {key}{suggestion(key.rpartition('.')[2], known)}") from None
        if first["type"] == "missing":
            raise ProbeError(f"{path}: key {key} is missing") from None
        expected = first["msg"].replace("Input should be ", "it must be ")
        raise ProbeError(f"{path}: {key} is {first['input']!r:.100}: {expected}") from None
    _check(found, path)
    return found


def _check(benchmark: Benchmark, path: Path) -> None:
    """Refuse values of the right type that make no sense."""
    if "{}" not in benchmark.template:
        raise ProbeError(f"{path}: template is {benchmark.template!r}: it must hold {{}}, where the text goes")
    for name, grouping in benchmark.groups.items():
        if len(grouping.labels) != len(grouping.bands):
            counts = f"{len(grouping.bands)} bands and {len(grouping.labels)} labels"
            raise ProbeError(f"{path}: groups.{name} has {counts}; give one label for each band")
        if any(low >= high for low, high in pairwise(grouping.bands)):
            raise ProbeError(f"{path}: groups.{name}.bands is {list(grouping.bands)}: it must ascend")
    outside = next((glob for glob in benchmark.files if not _stays(glob)), None)
    if outside is not None:
        raise ProbeError(f"{path}: files holds {outside!r}; globs of files below the data folder are wanted")
    try:
        re.compile(benchmark.file_name)
    except (re.error, OverflowError, RecursionError) as error:
        raise ProbeError(f"{path}: file_name is {benchmark.file_name!r}: {error}") from None


def _stays(glob: str) -> bool:
    """Return whether a glob is one that `Path.glob` takes, and stays below its folder."""
    parts = Path(glob).parts
    doubled = any("**" in part and part != "**" for part in parts)
    return bool(parts) and not Path(glob).is_absolute() and ".." not in parts and not doubled and "\0" not in glob


def _inside(folder: str) -> Path:
    return package_folder(f"probing/{folder}")


@cache
def _adapter() -> Any:
    return TypeAdapter(Benchmark)

"""How fast models write and what memory they take: two models run in turn, each in a process of its own."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NotRequired

import torch
import transformers
from pydantic import FiniteFloat
from typing_extensions import TypedDict

from lillama.errors import ModelError, RecipeError, ResourceError
from lillama.evaluation import speed_worker as timed
from lillama.evaluation.speed_worker import TOO_MUCH, Footprint, Setting, TimedRun
from lillama.files.artefacts import Count
from lillama.model.checkpoint import CheckpointReader
from lillama.model.kind import kind_of
from lillama.model.remote import remote_code
from lillama.model.skeleton import skeleton
from lillama.model.source import load_config, locate
from lillama.system.progress import Progress, Report, silent
from lillama.system.resources import pick_device

Dtype = Literal["float32", "bfloat16", "float16"]
Call = Callable[..., Any]
PACKED = {"U8": 2}  # numbers of 4 bits
WARM_UP = 2  # tokens: the prompt's and one step's


class SpreadJson(TypedDict):
    """Repeated measurements, in JSON."""

    min: float
    median: FiniteFloat
    max: float


class FiguresJson(TypedDict):
    """How fast a model is at one batch size and one prompt length, in JSON."""

    first_token_seconds: SpreadJson
    prefill_tokens_per_second: SpreadJson
    decode_tokens_per_second: SpreadJson


class RatiosJson(TypedDict):
    """How many times as fast one model is as another, in JSON."""

    prefill: SpreadJson
    decode: SpreadJson
    prefill_processor: SpreadJson
    decode_processor: SpreadJson


class CellJson(TypedDict):
    """What was measured at one batch size and one prompt length, in JSON."""

    batch: Count
    prompt: Count
    new: Count
    model: FiguresJson
    against: NotRequired[FiguresJson]
    ratios: NotRequired[RatiosJson]


class SubjectJson(TypedDict):
    """A model that was measured, in JSON."""

    name: str
    numbers: int
    disk_bytes: Count
    dtype: str
    peak_bytes: Count
    idle_bytes: Count


class BenchmarkJson(TypedDict):
    """What `lillama bench --json` prints."""

    version: int
    conditions: dict[str, Any]
    model: SubjectJson
    against: NotRequired[SubjectJson]
    cells: list[CellJson]


@dataclass(frozen=True)
class Spread:
    """Least, middle and largest of repeated measurements."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of some values.

        Examples:
            >>> Spread.of([3.0, 1.0, 5.0, 2.0])
            Spread(min=1.0, median=2.5, max=5.0)
        """
        return cls(min(values), statistics.median(values), max(values))

    def as_json(self) -> SpreadJson:
        """Return the value for JSON."""
        return {"min": self.min, "median": self.median, "max": self.max}


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Attributes:
        name: folder or hub id, as it was given.
        folder: where it lies.
        numbers: in its weight files; those of 4 bits lie there two in a byte.
        disk_bytes: of these files.
    """

    name: str
    folder: Path
    numbers: int
    disk_bytes: int

    def as_json(self, footprint: Footprint) -> SubjectJson:
        """Return the model and what it took, for JSON."""
        return {
            "name": self.name,
            "numbers": self.numbers,
            "disk_bytes": self.disk_bytes,
            "dtype": footprint.dtype,
            "peak_bytes": footprint.peak_bytes,
            "idle_bytes": footprint.idle_bytes,
        }


@dataclass(frozen=True)
class Workload:
    """What was measured at one batch size and one prompt length.

    Attributes:
        batch: sequences at once.
        prompt: tokens of a prompt.
        new: tokens written after it.
        runs: of each model; the i-th run of the second came right after the i-th of the first.
    """

    batch: int
    prompt: int
    new: int
    runs: tuple[tuple[TimedRun, ...], ...]

    def figures(self, index: int) -> dict[str, Spread]:
        """Return the seconds to the first token, and the tokens a second of the prompt and of what is written after."""
        first, rest = zip(*((run.first.clock, run.rest.clock) for run in self.runs[index]), strict=True)
        return {
            "first_token_seconds": Spread.of(first),
            "prefill_tokens_per_second": Spread.of([self.batch * self.prompt / seconds for seconds in first]),
            "decode_tokens_per_second": Spread.of([self.batch * (self.new - 1) / seconds for seconds in rest]),
        }

    def ratios(self) -> dict[str, Spread]:
        """Return how many times as fast as the second model the first is, from its runs and their neighbours.

        Once by the clock and once by what the processor computed, which on a busy machine is the steadier of the two.
        """
        pairs = list(zip(*self.runs, strict=True))
        return {
            "prefill": Spread.of([other.first.clock / own.first.clock for own, other in pairs]),
            "decode": Spread.of([other.rest.clock / own.rest.clock for own, other in pairs]),
            "prefill_processor": Spread.of([other.first.processor / own.first.processor for own, other in pairs]),
            "decode_processor": Spread.of([other.rest.processor / own.rest.processor for own, other in pairs]),
        }

    def as_json(self) -> CellJson:
        """Return the figures of all models, and their ratios, for JSON."""
        figures = [_figures_json(self.figures(index)) for index in range(len(self.runs))]
        found: CellJson = {"batch": self.batch, "prompt": self.prompt, "new": self.new, "model": figures[0]}
        if len(figures) > 1:
            found["against"], found["ratios"] = figures[1], _ratios_json(self.ratios())
        return found


@dataclass(frozen=True)
class SpeedComparison:
    """Speed, memory and size of a model, and of another one beside it.

    Attributes:
        subjects: the model, and the other one if there is one.
        footprints: what each took.
        cells: one for each batch size and prompt length.
        conditions: device, threads, seed, repeats and versions.
    """

    subjects: tuple[Subject, ...]
    footprints: tuple[Footprint, ...]
    cells: tuple[Workload, ...]
    conditions: dict[str, Any]

    @property
    def paired(self) -> bool:
        """Whether two models were measured."""
        return len(self.subjects) > 1

    def as_json(self) -> BenchmarkJson:
        """Return everything as a JSON value with a version."""
        models = [one.as_json(footprint) for one, footprint in zip(self.subjects, self.footprints, strict=True)]
        cells = [cell.as_json() for cell in self.cells]
        model, conditions = models[0], self.conditions
        if not self.paired:
            return {"version": 1, "conditions": conditions, "model": model, "cells": cells}
        return {"version": 1, "conditions": conditions, "model": model, "against": models[1], "cells": cells}


def benchmark(
    model: str | Path,
    against: str | Path | None = None,
    *,
    batch: Sequence[int] = (1, 4),
    prompt: Sequence[int] = (128, 512),
    new: int = 32,
    repeats: int = 5,
    device: str | None = None,
    dtype: Dtype | None = None,
    threads: int | None = None,
    seed: int = 0,
    report: Report = silent,
    trust_remote_code: bool = False,
) -> SpeedComparison:
    """Measure how fast a model reads prompts and writes after them, greedily and with a key-value cache.

    Each model lives in a fresh process, so that its peak memory is its own. The two take turns, run by run, so that the
    noise of a shared machine falls on both; before the runs that count, each warms up at the same batch and length. A script
    that calls this needs the guard `if __name__ == "__main__":`, as for every process that Python spawns.

    Args:
        model: folder or hub id of a model with a language-model head, dense or compressed by lillama.
        against: another one to compare with, usually the dense original.
        batch: numbers of sequences at once.
        prompt: numbers of tokens of a prompt; the tokens are random.
        new: tokens to write, at least 2: the first belongs to the prompt. Ends of text are ignored.
        repeats: runs of each model at every batch and length.
        device: that computes; by default an accelerator if there is one.
        dtype: of the weights in memory; by default the stored one.
        threads: of the CPU; by default torch's own choice.
        seed: of the prompts.
        report: told about every batch and length.
        trust_remote_code: whether code that lies in a model's folder (`auto_map`) may run, as in transformers.

    Raises:
        LillamaError: a model cannot be used, an option makes no sense, or memory does not suffice.
    """
    _refuse_below(1, batch=batch, prompt=prompt, repeats=[repeats], threads=[1 if threads is None else threads])
    _refuse_below(2, new=[new])
    names = [model] if against is None else [model, against]
    with remote_code(trust_remote_code):
        subjects = tuple(subject(name, max(prompt), new) for name in names)
    setting = Setting(str(pick_device(device)), dtype, threads or torch.get_num_threads(), seed, trust_remote_code)
    grid = [(rows, length) for rows in batch for length in prompt]
    cells: list[Workload] = []
    with ExitStack() as stack:
        processes = [stack.enter_context(process(one, setting)) for one in subjects]
        for done, (rows, length) in enumerate(grid):
            report(Progress("runs", done, len(grid), f"batch {rows}, prompt {length}"))
            cells.append(Workload(rows, length, new, in_turn(processes, rows, length, new, repeats)))
        report(Progress("runs", len(grid), len(grid)))
        footprints = tuple(call(timed.footprint) for call in processes)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    conditions = {"device": setting.device, "threads": setting.threads, "seed": seed, "repeats": repeats} | versions
    return SpeedComparison(subjects, footprints, tuple(cells), conditions)


def subject(name: str | Path, prompt: int, new: int) -> Subject:
    """Find a model and read its size; nothing is loaded.

    Raises:
        ModelError: no such model, it cannot write text, or not after so long a prompt.
    """
    folder = locate(name)
    model = skeleton(load_config(folder))
    kind = kind_of(model)
    if not model.can_generate():
        raise ModelError(
            f"{folder}: {type(model).__name__} has no language-model head and cannot write; give one that has"
        )
    if not kind.takes_tokens or kind.stacks > 1:
        raise ModelError(
            f"{folder}: prompts of {type(model).__name__} are not tokens to go on with; no speed is measured"
        )
    if kind.max_positions is not None and prompt + new > kind.max_positions:
        raise ModelError(
            f"{folder}: a prompt of {prompt} and {new} new tokens make {prompt + new}, but the model has "
            f"{kind.max_positions} positions; lower --prompt or --new"
        )
    reader = CheckpointReader(folder)
    numbers = sum(math.prod(entry.shape) * PACKED.get(entry.dtype, 1) for entry in reader.entries.values())
    return Subject(str(name), folder, numbers, sum(file.stat().st_size for file in reader.files))


@contextmanager
def process(one: Subject, setting: Setting) -> Iterator[Call]:
    """Yield a function that calls another, with folder and setting before its own arguments, in one fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn"), timed.begin) as pool:

        def call(function: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return pool.submit(function, str(one.folder), setting, *arguments).result()
            except BrokenProcessPool:
                raise ResourceError(
                    f"{one.name}: its process was ended from outside, as happens when memory runs out; {TOO_MUCH}"
                ) from None

        yield call


def in_turn(
    processes: Sequence[Call], batch: int, prompt: int, new: int, repeats: int
) -> tuple[tuple[TimedRun, ...], ...]:
    """Return the runs of each model, taken round by round after one short run of each to warm up."""
    for call in processes:
        call(timed.run, batch, prompt, WARM_UP)
    rounds = [[call(timed.run, batch, prompt, new) for call in processes] for _ in range(repeats)]
    return tuple(zip(*rounds, strict=True))


def _figures_json(figures: Mapping[str, Spread]) -> FiguresJson:
    return {
        "first_token_seconds": figures["first_token_seconds"].as_json(),
        "prefill_tokens_per_second": figures["prefill_tokens_per_second"].as_json(),
        "decode_tokens_per_second": figures["decode_tokens_per_second"].as_json(),
    }


def _ratios_json(ratios: Mapping[str, Spread]) -> RatiosJson:
    return {
        "prefill": ratios["prefill"].as_json(),
        "decode": ratios["decode"].as_json(),
        "prefill_processor": ratios["prefill_processor"].as_json(),
        "decode_processor": ratios["decode_processor"].as_json(),
    }


def _refuse_below(least: int, **options: Sequence[int]) -> None:
    """Raise `RecipeError` where a value of an option is too small, or the option has none."""
    for name, values in options.items():
        smallest = min(values, default=0)
        if smallest < least:
            raise RecipeError(f"{name} is {smallest}; it must be at least {least}")

"""What is compared, what it is calibrated and measured on, and what a rehearsal changes of that."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from models import cached, default_cache

Part = Literal["test", "valid"]

KEEPS = (0.8, 0.6)  # of the block parameters
POSITIONS = 1500  # of Whisper's encoder: what an utterance counts as in a budget of tokens
INSTRUCTIONS = "text/selfinstruct_seed_tasks_en.jsonl"
DOCUMENTS = (
    {"path": "text/c4_demo.jsonl", "weight": 4.0},
    {"path": "text/wiki_demo.jsonl", "weight": 3.0},
    {"path": INSTRUCTIONS, "weight": 1.0},
)
SENTENCES = {"valid": ("text/ud_english_ewt_web.dev.jsonl",), "test": ("text/ud_english_ewt_web.test.jsonl",)}
TEXTS = {
    "valid": ("text/wikitext2.valid.tokens.txt", "text/eng.dev.txt"),
    "test": ("text/wikitext2.test.raw.txt", "text/eng.dev.txt"),
}


@dataclass(frozen=True)
class Case:
    """A model and what belongs to it.

    Attributes:
        name: of its folder, and in bench/models.py.
        kind: of what it does, which decides how it is calibrated and measured.
        tokens: of calibration.
        seq_len: tokens of a calibration sequence; an utterance takes the place of one.
        sources: that calibration reads, below the assets.
        measured: part -> files that it is measured on, below the assets.
        modules: Python packages that its measures need.
        programs: that they need.
        note: a word on where the weights come from.
    """

    name: str
    kind: Literal["language", "speech", "sentences"]
    tokens: int
    seq_len: int
    sources: tuple[Mapping[str, Any], ...]
    measured: Mapping[str, tuple[str, ...]]
    modules: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    note: str = ""

    @property
    def folder(self) -> Path:
        """Return where the model lies, if it was fetched."""
        return default_cache() / self.name

    def lacking(self, part: Part, assets: Path) -> str | None:
        """Return what is missing to compute its rows, as one line; None if nothing is."""
        if cached(self.name, default_cache()) is None:
            return f"{self.name}: no model at {self.folder}; python bench/models.py {self.name} fetches it"
        for file in (*(source["path"] for source in self.sources), *self.measured[part]):
            if not (assets / file).exists():
                return f"{self.name}: no {assets / file}; set LILLAMA_ASSETS to the folder with the texts"
        for module in self.modules:
            if find_spec(module) is None:
                return f"{self.name}: {module} is not installed; pip install {module}"
        for program in self.programs:
            if shutil.which(program) is None:
                return f"{self.name}: {program} is not installed; get it from the system's packages"
        return None


CASES = {case.name: case for case in (
    Case("smollm2-135m", "language", 131_072, 512, DOCUMENTS, TEXTS, modules=("lm_eval",), note=(
        "The original's weights lie on a 4-bit grid (they come from a Q4_1 file); the model with these weights is what all "
        "rows are compared with.")),
    Case("whisper-base", "speech", 48 * POSITIONS, POSITIONS, DOCUMENTS[1:2],
         {"valid": SENTENCES["valid"], "test": ("speech/transcripts.jsonl", *SENTENCES["test"])},
         modules=("jiwer", "soundfile"), programs=("espeak-ng",)),
    Case("minilm", "sentences", 131_072, 128, DOCUMENTS, SENTENCES),
)}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What rows have to share to be compared.

    Attributes:
        part: `test` is reported; choices are made on `valid`.
        limit: documents of each task, windows and prompts of each text, sentences; None: all.
        tokens: of calibration; None: each model's own number.
    """

    part: Part = "test"
    limit: int | None = None
    tokens: int | None = None

    @property
    def name(self) -> str:
        """Return a name for files: `test`, `valid-limit2`, `test-tokens4096`."""
        sizes = (("limit", self.limit), ("tokens", self.tokens))
        return "-".join([self.part, *(f"{key}{value}" for key, value in sizes if value is not None)])


@dataclass(frozen=True)
class Place:
    """Where a row is computed: the texts, the folder of the rows, the device asked for; none of it is part of the figures."""

    assets: Path
    out: Path
    device: str | None = None


@dataclass(frozen=True)
class Job:
    """One row.

    Attributes:
        model: name of the case.
        row: name of the row.
        keep: share of the block parameters.
        seed: of every random choice.
        time: that making it may take, for rows that can be told; None: what it takes.
    """

    model: str
    row: str
    keep: float
    seed: int = 0
    time: str | None = None

    @property
    def name(self) -> str:
        """Return a name for files."""
        return "-".join([self.model, self.row, str(self.keep), str(self.seed), *([self.time] if self.time else [])])


def jobs(case: Case, rows: Mapping[str, Any], seed: int, time: str | None) -> Iterator[Job]:
    """Yield the rows of a model: the original once, the others at every size.

    Args:
        case: the model.
        rows: name -> row, see `real_models.rows`.
        seed: of all of them.
        time: for the rows that can be told how much they have.
    """
    yield from (Job(case.name, name, 1.0, seed) for name, row in rows.items() if row.make is None)
    for keep in KEEPS:
        for name, row in rows.items():
            if row.make is not None and case.kind in row.kinds:
                yield Job(case.name, name, keep, seed, time if row.timed else None)

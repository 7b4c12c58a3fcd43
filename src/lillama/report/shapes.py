"""What form the artefacts have that a report reads; keys that it does not read are not named."""

from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, FiniteFloat, PositiveInt
from typing_extensions import TypedDict  # pydantic reads that of `typing` from Python 3.12 on

from lillama.lowrank.storage import Storage

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[FiniteFloat, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
LossRow = tuple[Count, FiniteFloat | None, FiniteFloat | None]


class Recipe(TypedDict):
    """What a report asks of a recipe; the rest is shown as it is."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]
    ranks: NotRequired[dict[str, Any]]
    recover: NotRequired[dict[str, Any]]


class Identity(TypedDict, total=False):
    """What a run computes."""

    recipe: Recipe
    plan: Any


class Run(TypedDict, total=False):
    """`run.json`."""

    identity: Identity


class Linear(TypedDict):
    """A linear of a block."""

    name: str


class Block(TypedDict):
    """A block of the model."""

    name: str
    index: int
    linears: list[Linear]


class Spec(TypedDict):
    """`spec.json`."""

    architecture: NotRequired[str]
    blocks: list[Block]


Planned = TypedDict("Planned", {"name": str, "out": PositiveInt, "in": PositiveInt, "rank": PositiveInt | None})


class Plan(TypedDict):
    """`plan.json`."""

    storage: NotRequired[Storage]
    linears: list[Planned]


class Source(TypedDict, total=False):
    """A source of calibration text."""

    path: str


class Manifest(TypedDict):
    """`calibration/manifest.json`."""

    tokens: Count
    wanted: NotRequired[Count | None]
    kind: NotRequired[str]
    seq_len: NotRequired[Count]
    sources: NotRequired[list[Source]]


class BlockLog(TypedDict):
    """`blocks/*.json`."""

    block: str
    steps: Count
    tokens: NotRequired[Count]
    initial: NotRequired[FiniteFloat]
    final: NotRequired[FiniteFloat]
    improved: NotRequired[bool]
    best_step: NotRequired[Count]
    retried: NotRequired[bool]
    curve: NotRequired[list[LossRow]]
    held_out: NotRequired[list[LossRow]]
    singular: NotRequired[dict[str, tuple[FiniteFloat, FiniteFloat]]]


class Recovery(TypedDict):
    """`recovered/log.json`."""

    improved: bool
    stopped: NotRequired[str]
    grown: NotRequired[dict[str, FiniteFloat]]
    curve: NotRequired[list[tuple[Count, FiniteFloat, FiniteFloat]]]
    held_out: NotRequired[list[tuple[Count, FiniteFloat, FiniteFloat, FiniteFloat]]]


class Allocation(TypedDict, total=False):
    """`allocation.json`."""

    chosen: FiniteFloat
    candidates: list[Any]


class Sizes(TypedDict):
    """A size of the original and of the compressed model."""

    dense: PositiveInt
    kept: PositiveInt


class Score(TypedDict):
    """How well a text is predicted."""

    perplexity: Positive


class Text(TypedDict):
    """A text, measured before and after."""

    name: str
    before: Score
    after: Score


class HeldOut(TypedDict, total=False):
    """What became of the predictions on held-out calibration text."""

    kl: FiniteFloat
    rise: FiniteFloat


class Result(TypedDict, total=False):
    """`lillama.json` and `metrics.json`."""

    version: Any
    path: str
    run: str
    keep: FiniteFloat
    params: Sizes
    bytes: Sizes
    texts: list[Text]
    held_out: HeldOut
    seconds: FiniteFloat
    peak_bytes: Count
    environment: dict[str, str]


class Spread(TypedDict):
    """A value, and its bounds if it has any."""

    value: FiniteFloat
    low: NotRequired[FiniteFloat | None]
    high: NotRequired[FiniteFloat | None]


class Sample(TypedDict):
    """One continuation of both models."""

    prompt: str
    same: str
    dense: str
    model: str


class Continuations(TypedDict, total=False):
    """What both models write after prompts."""

    samples: list[Sample]


class Agreement(TypedDict, total=False):
    """How far a text's predictions are from those of the original."""

    perplexity: FiniteFloat
    excess_loss: Spread
    kl: Spread
    top1: Spread
    continuation: Continuations | None


class MeasuredText(TypedDict):
    """A text of `lillama evaluate`."""

    name: str
    perplexity: FiniteFloat
    against: NotRequired[Agreement]


class TaskAgainst(TypedDict, total=False):
    """The original's score in a task."""

    value: FiniteFloat
    difference: Spread


class Task(TypedDict):
    """A task of `lillama evaluate`."""

    task: str
    metric: str
    value: FiniteFloat
    against: NotRequired[TaskAgainst]


class Evaluation(TypedDict, total=False):
    """What `lillama evaluate` prints."""

    texts: list[MeasuredText]
    tasks: list[Task]


class Group(TypedDict):
    """A group of minimal pairs."""

    label: str
    items: Count
    score: Share | None
    dense: NotRequired[Share | None]


class Compared(TypedDict, total=False):
    """The original's accuracy."""

    dense: Share | None


class Probe(TypedDict):
    """What `lillama probe` prints about one benchmark."""

    benchmark: str
    overall: Share
    model: NotRequired[str]
    items: NotRequired[Count]
    chance: NotRequired[Share]
    compared: NotRequired[Compared | None]
    breakdowns: NotRequired[dict[str, list[Group]]]


class Probes(TypedDict, total=False):
    """What `lillama probe` prints about several."""

    results: list[Probe]


class Median(TypedDict):
    """Times of several runs."""

    median: FiniteFloat


class Speeds(TypedDict, total=False):
    """Tokens a second."""

    prefill_tokens_per_second: Median
    decode_tokens_per_second: Median


class Cell(TypedDict):
    """One setting of `lillama bench`."""

    batch: Count
    prompt: Count
    model: Speeds
    against: NotRequired[Speeds]


class Subject(TypedDict, total=False):
    """What a model takes."""

    disk_bytes: Count
    peak_bytes: Count
    idle_bytes: Count


class Bench(TypedDict, total=False):
    """What `lillama bench` prints."""

    conditions: dict[str, Any]
    model: Subject
    against: Subject
    cells: list[Cell]

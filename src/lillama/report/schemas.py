"""What a report asks of the artefacts that it reads, in the schemas of those that write them.

A report shows runs that are not finished, and files that may be damaged or foreign: it needs few keys, and does without all
others.
"""

from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, NotRequired, Required, Union, get_args, get_origin

from pydantic import ConfigDict
from typing_extensions import TypedDict, get_type_hints, is_typeddict

from lillama.calibration.pack import ManifestJson
from lillama.distill.log import BlockLogJson
from lillama.evaluation.continuation_samples import SampleJson
from lillama.evaluation.evaluate import TextJson
from lillama.evaluation.intervals import IntervalJson
from lillama.evaluation.speed import CellJson, SpreadJson
from lillama.evaluation.tasks import TaskJson
from lillama.lowrank.storage import StorageJson
from lillama.model.spec import BlockJson, LinearJson, SpecJson
from lillama.probing.average import AccuracyJson
from lillama.probing.result import ProbeJson
from lillama.ranks.plan import PlanJson, PlannedJson
from lillama.recovery.log import RecoveryJson
from lillama.runs.result import LossJson, SizesJson, TextPairJson

NEEDED: Mapping[Any, tuple[str, ...]] = {  # without which a part of an artefact tells nothing
    AccuracyJson: ("label", "items", "score"),
    BlockJson: ("name", "index", "linears"),
    BlockLogJson: ("block", "steps"),
    CellJson: ("batch", "prompt", "model"),
    IntervalJson: ("value",),
    LinearJson: ("name",),
    LossJson: ("perplexity",),
    ManifestJson: ("tokens",),
    PlanJson: ("linears",),
    PlannedJson: ("name", "out", "in", "rank"),
    ProbeJson: ("benchmark", "overall"),
    RecoveryJson: ("improved",),
    SampleJson: ("prompt", "same", "dense", "model"),
    SizesJson: ("dense", "kept"),
    SpecJson: ("blocks",),
    SpreadJson: ("median",),
    StorageJson: ("form", "bits", "group_size"),
    TaskJson: ("task", "metric", "value"),
    TextJson: ("name", "perplexity"),
    TextPairJson: ("name", "before", "after"),
}

CONTAINERS: tuple[Any, ...] = (list, tuple, dict, Sequence, Mapping)


class RecipeJson(TypedDict):
    """What a report asks of a recipe; the rest is shown as it is."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]
    ranks: dict[str, Any]
    recover: dict[str, Any]


class IdentityJson(TypedDict):
    """What a run computes, as far as a report asks."""

    recipe: RecipeJson
    plan: Any


class RunJson(TypedDict):
    """`run.json`."""

    identity: IdentityJson


def has(part: Mapping[str, object], key: str) -> bool:
    """Tell whether a part of an artefact has a key.

    Pyright takes `key in part` for a proof that the schema has the key too, and would not see that its writer renamed it; nor
    does it in `part.get(key)`, which is for keys that the writer itself leaves out.
    """
    return key in part


def tolerant(schema: Any) -> Any:
    """Return a schema in which all that a report can do without may be missing, at any depth.

    Args:
        schema: a TypedDict, or a type made of some.

    Examples:
        >>> sorted(tolerant(IntervalJson).__required_keys__), sorted(tolerant(IntervalJson).__optional_keys__)
        (['value'], ['high', 'low'])
    """
    if is_typeddict(schema):
        hints, needed = get_type_hints(schema, include_extras=True), NEEDED.get(schema, ())
        assert hints.keys() >= set(needed), f"{schema.__name__} has not all of {needed}"
        keys = {key: (Required if key in needed else NotRequired)[tolerant(hint)] for key, hint in hints.items()}
        found: Any = TypedDict(schema.__name__, keys)  # pyright: ignore[reportArgumentType]
        found.__pydantic_config__ = getattr(schema, "__pydantic_config__", ConfigDict())
        return found
    origin: Any = get_origin(schema)
    parts = get_args(schema)
    if origin in (Required, NotRequired):
        return tolerant(parts[0])
    if origin in (Union, UnionType):
        return Union[tuple(map(tolerant, parts))]  # noqa: UP007
    if origin in CONTAINERS:
        return origin[tuple(map(tolerant, parts))]
    return schema

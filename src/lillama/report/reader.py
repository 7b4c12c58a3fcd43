"""Read artefacts that may be damaged or foreign: what has the right form is kept, what has not is named."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file  # pyright: ignore[reportUnknownVariableType]

from lillama.files.atomic import read_small
from lillama.report.schemas import tolerant

Json = dict[str, Any]
Read = TypeVar("Read")
JsonValues = NDArray[np.floating[Any]]
JsonPath = tuple[str | int, ...]


@dataclass
class Reader:
    """Reads artefacts; what fails is noted, never raised.

    Attributes:
        missing: notes so far.
    """

    missing: list[str] = field(default_factory=list)

    def json(
        self,
        path: Path,
        schema: type[Read],
        wanted: bool = True,
        key: str = "version",
        form: Callable[[Json], Json] = lambda value: value,
    ) -> Read:
        """Return what a JSON file holds of `schema`; empty if it is not there, is damaged or has not `key`.

        Args:
            path: of the file.
            schema: a TypedDict; keys may be missing all the same, see `schemas`.
            wanted: whether its absence is noted.
            key: without which it is no such file.
            form: brings one form of the file into that of `schema`.
        """
        read = self._read(path, lambda: [json.loads(read_small(path).decode())], wanted)
        if read is None:
            return cast(Read, {})
        name, (value,) = _name(path), read
        if not isinstance(value, dict) or key not in value:
            self.missing.append(f"{name}: damaged, it has no {key!r}")
            return cast(Read, {})
        found, faults = keep_valid(schema, form(value))
        if not found and not faults:
            self.missing.append(f"{name}: holds nothing that a report shows")
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            self.missing.append(f"{name}: {faults[0]}{more}")
        return found

    def tensors(self, path: Path, wanted: bool) -> Mapping[str, JsonValues]:
        """Return the arrays of a safetensors file; none if it is not there or is damaged."""
        return self._read(path, lambda: load_file(path), wanted) or {}

    def _read(self, path: Path, load: Callable[[], Any], wanted: bool) -> Any:
        if not path.is_file():
            self.missing += [f"{_name(path)}: not there"] if wanted else []
            return None
        try:
            return load()
        except (OSError, ValueError, KeyError, RecursionError, SafetensorError):
            self.missing.append(f"{_name(path)}: damaged")
            return None


def keep_valid(schema: type[Read], value: Json) -> tuple[Read, list[str]]:
    """Take out of a JSON object what has not its schema, and what cannot be without that.

    Args:
        schema: a TypedDict.
        value: changed in place.

    Returns:
        what is left, empty where nothing can be; and a line on each part that was taken out.

    Examples:
        >>> from lillama.ranks.candidates import AllocationJson
        >>> keep_valid(AllocationJson, {"chosen": 1.0, "candidates": 3})
        ({'chosen': 1.0}, ['candidates is 3, it should be a valid list'])
    """
    faults: list[str] = []
    while True:
        try:
            return _adapter(schema).validate_python(value), faults
        except ValidationError as error:
            found = {_reach(value, one["loc"]): one for one in error.errors(include_url=False)}
        faults += [_complaint(one["loc"], one["type"], one["msg"], one["input"]) for one in found.values()]
        if () in found:
            return cast(Read, {}), faults
        outer = [place for place in found if not any(place[:end] in found for end in range(1, len(place)))]
        for place in reversed(outer):  # so that the places before it in a list stay where they are
            del _at(value, place[:-1])[place[-1]]


@cache
def _adapter(schema: Any) -> Any:
    return TypeAdapter(tolerant(schema))


def _reach(value: Any, place: JsonPath) -> JsonPath:
    """Return the longest beginning of a place that is there: of a missing key, the object that lacks it."""
    for depth, step in enumerate(place):
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return place[:depth]
    return place


def _at(value: Any, place: Sequence[str | int]) -> Any:
    for step in place:
        value = value[step]
    return value


def _complaint(place: JsonPath, kind: str, message: str, found: Any) -> str:
    name = ".".join(map(str, place))
    if kind == "missing":
        return f"{name} is not there"
    text = repr(found)
    shown = text if len(text) <= 40 else f"{text[:37]}..."
    return f"{name} is {shown}, {message.replace('Input', 'it')}"


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"

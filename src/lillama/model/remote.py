"""Code that lies in model folders (`auto_map`): it never runs, unless somebody says so."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from lillama.errors import ModelError, printable

logger = logging.getLogger(__name__)

_allowed: ContextVar[set[str] | None] = ContextVar("allowed", default=None)  # what was told of; None: no code runs


@contextmanager
def remote_code(allowed: bool) -> Iterator[None]:
    """Let the code of the models that are read in this context run, if it is allowed.

    Args:
        allowed: whether it runs, as `trust_remote_code` of transformers; false leaves things as they are around.
    """
    token = _allowed.set(set() if allowed and not runs_code() else _allowed.get())
    try:
        yield
    finally:
        _allowed.reset(token)


def runs_code() -> bool:
    """Tell whether the code of models may run here; it may not unless `remote_code` says so."""
    return _allowed.get() is not None


def announce(folder: Path, config: Mapping[str, Any]) -> None:
    """Say aloud, once for the same names, whose code is about to run."""
    told, names = _allowed.get(), ", ".join(sorted(code_names(config)))
    if told is not None and names and names not in told:
        told.add(names)
        logger.warning("%s: code of this model runs (%s)", folder, names)


def code_names(config: Mapping[str, Any]) -> set[str]:
    """Return the classes that an `auto_map` names, as `module.Class`; there is none in most configurations."""
    found = config.get("auto_map")
    values = found.values() if isinstance(found, Mapping) else ()
    flat = (one for value in values for one in (value if isinstance(value, list | tuple) else [value]))
    return {printable(one) for one in flat if isinstance(one, str)}


def needs_code(file: str | Path, name: str) -> ModelError:
    """Return the error for a model that cannot be read without its own code."""
    return ModelError(
        f"{file}: this model needs code of its own (auto_map names {printable(name)}), which is not run; read that code, and "
        "if you trust it give --trust-remote-code, or take a model of transformers' own kinds"
    )

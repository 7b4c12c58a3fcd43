"""Writes that survive a kill at any instant: a reader sees the old content or the new, never a half."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lillama.errors import LillamaError

JSON_BYTES, JSON_DEPTH = 64 << 20, 100  # the index of the largest public models takes 20 MB


def sync(path: Path) -> None:
    """Flush a file or a folder entry to the disk, so that it outlives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed to `path`, on failure it is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success it takes the place of `path`, on failure it is removed.

    A folder that stood at `path` before is kept until the new one is complete.
    """
    path = path.resolve()  # a link keeps leading to the folder, and the folder stays on its disk
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    _bring_back(old, path)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        sync(path.parent)
    finally:
        _bring_back(old, path)
        shutil.rmtree(temporary, ignore_errors=True)


def _bring_back(old: Path, path: Path) -> None:
    """End a replacement that stopped between its two renames, or after both: the folder aside goes back, or goes."""
    if old.exists() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, error: type[LillamaError], remedy: str) -> dict[str, Any]:
    """Read a JSON object that somebody else may have written.

    As in transformers, the last of several equal keys counts, and `NaN` and `Infinity` are numbers.

    Args:
        path: of the file.
        error: raised where the file cannot be used.
        remedy: ends the line that says so.

    Raises:
        LillamaError: no such file, or one that may not be read, is larger than 64 MiB or nested deeper than 100 levels, is
            not UTF-8 text, not JSON, or no object.
    """
    try:
        with path.open("rb") as file:
            content = file.read(JSON_BYTES + 1)
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as failure:
        raise error(f"{path}: cannot be read ({failure.strerror}); {remedy}") from None
    if len(content) > JSON_BYTES:
        raise error(f"{path}: larger than {JSON_BYTES >> 20} MiB, which no such file is; {remedy}")
    try:
        value = json.loads(content.decode("utf-8"))
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half a character could be read, but never be written
    except RecursionError:
        raise error(f"{path}: nested too deeply; {remedy}") from None
    except ValueError as failure:
        reason = "half a character" if isinstance(failure, UnicodeEncodeError) else str(failure)
        raise error(f"{path}: not valid JSON ({reason}); {remedy}") from None
    if not isinstance(value, dict):
        raise error(f"{path}: a JSON {type(value).__name__}, where an object {{...}} is needed; {remedy}")
    if _is_deep(value):
        raise error(f"{path}: nested too deeply; {remedy}")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(JSON_DEPTH):
        level = [one for outer in level for one in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(one, dict | list)]  # fmt: skip
        if not level:
            return False
    return True


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value's canonical form (sorted keys, no spaces), in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

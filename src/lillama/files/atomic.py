"""Writes that survive a kill at any instant: a reader sees the old content or the new, never a half."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lillama.errors import LillamaError, OutputError

ASIDE = ".lillama"  # at the end of the name of the folder that stands beside a place while it is worked on
NEW, OLD, LOCK = "new", "old", "lock"  # in that folder
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


def resolve_path(path: Path) -> Path:
    """Return where a path leads, links followed.

    Raises:
        OutputError: it leads in a circle, or no file can have its name.
    """
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a RuntimeError up to Python 3.12
        raise OutputError(f"{path}: a link that leads nowhere ({error}); name a folder") from None


def refuse_present(folder: Path) -> None:
    """Refuse a folder that is to be made and is there already.

    Raises:
        OutputError: something stands at its place, be it a link that leads nowhere.
    """
    if os.path.lexists(folder):
        raise OutputError(f"{folder}: exists already; remove it or name another folder")


@contextmanager
def make_folder(path: Path) -> Iterator[None]:
    """Make a folder and those around it; in the end those that were made here and are empty are removed again."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for folder in missing:
            with suppress(OSError):  # it is not empty: it is used
                folder.rmdir()


@contextmanager
def lock_file(file: Path, refusal: str) -> Iterator[None]:
    """Hold a lock on a file, made if need be; the lock ends with the process, however that ends.

    Raises:
        OutputError: another process holds it; the text is `refusal`.
    """
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise OutputError(refusal) from None
    try:
        if not file.exists():  # the process that held it has just removed it
            raise OutputError(refusal)
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class Claim:
    """The place of a folder that belongs to this process alone, while `claimed` lasts.

    Attributes:
        path: of the folder, links followed.
        aside: folder beside it that holds what is not yet, or no longer, there.
    """

    path: Path
    aside: Path

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """Yield an empty folder; on success it takes the place of `path`, on failure it is removed.

        A folder that stood at `path` before is kept until the new one is complete.
        """
        new, old = self.aside / NEW, self.aside / OLD
        new.mkdir()
        try:
            yield new
            for file in new.rglob("*"):
                sync(file)
            sync(new)
            if self.path.exists():
                self.path.rename(old)
            new.rename(self.path)
            sync(self.path.parent)
        finally:
            _settle(self.path, self.aside)


@contextmanager
def claim_place(path: Path) -> Iterator[Claim]:
    """Claim the place of a folder, and end what a killed process began there.

    Beside the folder stands another one, `.NAME.lillama`, meanwhile; nothing else around it is touched.

    Raises:
        OutputError: another process has claimed it, or something else stands where the folder beside it would.
    """
    path = resolve_path(path)  # a link keeps leading to the folder, and the folder stays on its disk
    aside = path.with_name(f".{path.name}{ASIDE}")
    lock = aside / LOCK
    with make_folder(path.parent):
        _make(aside, path)
        found = {entry.name for entry in aside.iterdir()}
        strange = sorted(found - {NEW, OLD, LOCK} if LOCK in found else found)
        if strange:
            raise OutputError(
                f"{aside}: holds {strange[0]}, which is not of lillama; move it, or choose another folder"
            )
        try:
            with lock_file(lock, f"{path}: another process works on it; wait for it, or choose another folder"):
                try:
                    _settle(path, aside)
                    yield Claim(path, aside)
                finally:
                    lock.unlink(missing_ok=True)  # still held: whoever makes a new one is the next
        finally:
            with suppress(OSError):  # another process has come
                aside.rmdir()


def _make(aside: Path, path: Path) -> None:
    try:
        aside.mkdir(exist_ok=True)
    except FileExistsError:
        raise OutputError(f"{aside}: this file is not of lillama; move it, or choose another folder") from None
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise OutputError(
            f"{path}: nothing can be written to {path.parent} ({error.strerror}); choose another folder"
        ) from None


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; on success it takes the place of `path`, on failure it is removed.

    A folder that stood at `path` before is kept until the new one is complete.
    """
    with claim_place(path) as claim, claim.folder() as folder:
        yield folder


def settle_leftovers(folder: Path) -> None:
    """End what a killed process began with the folders in `folder`, at any depth."""
    for aside in [*folder.rglob(f".*{ASIDE}")]:
        with claim_place(aside.with_name(aside.name.removeprefix(".").removesuffix(ASIDE))):
            pass


def _settle(path: Path, aside: Path) -> None:
    """End a replacement that stopped before, between or after its two renames: what was aside goes back, or goes."""
    if (aside / OLD).exists() and not path.exists():
        (aside / OLD).rename(path)
    for left in (aside / OLD, aside / NEW):
        if left.exists():
            shutil.rmtree(left)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    try:
        content = text.encode()
    except UnicodeEncodeError:  # a file name that is no text; JSON has escapes for it
        content = json.dumps(value, indent=2).encode() + b"\n"
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


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
        content = read_small(path)
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as failure:
        raise error(f"{path}: cannot be read ({failure.strerror}); {remedy}") from None
    except ValueError as failure:
        raise error(f"{path}: {failure}; {remedy}") from None
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


def read_small(path: Path) -> bytes:
    """Return the content of a file that is read at once.

    Raises:
        OSError: no such file, or one that may not be read; a pipe or a device, which may never end, is none.
        ValueError: it is larger than 64 MiB.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise FileNotFoundError(errno.ENOENT, "a pipe, a socket or a device, and no file", str(path))
    try:
        with path.open("rb") as file:
            content = file.read(JSON_BYTES + 1)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENAMETOOLONG):
            raise
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from None  # there is no such file
    if len(content) > JSON_BYTES:
        raise ValueError(f"larger than {JSON_BYTES >> 20} MiB, which no such file is")
    return content


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(JSON_DEPTH):
        level = [
            one
            for outer in level
            for one in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(one, dict | list)
        ]
        if not level:
            return False
    return True


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value's canonical form (sorted keys, no spaces), in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

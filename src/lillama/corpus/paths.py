"""What stands at the paths that the user names: files and folders are read, everything else is told by its name."""

import errno
import os
import stat
from pathlib import Path
from typing import Literal

from lillama.errors import DataError, LillamaError

OTHERS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}

WHOLE = 1 << 30  # bytes of a file that is read at once

Standing = Literal["file", "folder", "nothing"]


def standing(path: Path, kind: type[LillamaError] = DataError) -> Standing:
    """Return what stands at a path, links followed.

    Args:
        path: that the user named.
        kind: of the error.

    Raises:
        LillamaError: of the kind given: a pipe, a device or a socket, which may never end, a link that leads nowhere or in
            a circle, a place that may not be looked at, a name that is not UTF-8.
    """
    try:
        str(path).encode()
        mode = path.stat().st_mode
    except UnicodeEncodeError:
        raise kind(f"{path}: the name is not UTF-8; rename it") from None
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise kind(f"{path}: is a link to {path.readlink()}, which is not there; mend it or leave it out") from None
        return "nothing"
    except (OSError, ValueError) as error:
        circle = getattr(error, "errno", None) == errno.ELOOP
        reason = "its links lead in a circle" if circle else getattr(error, "strerror", None) or error
        raise kind(f"{path}: cannot be read ({reason}); check the path and who may read it") from None
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    raise kind(f"{path}: is {OTHERS.get(stat.S_IFMT(mode), 'no file')}; files and folders are read, copy it to a file")


def refuse_no_file(path: Path, kind: type[LillamaError] = DataError) -> None:
    """Raise an error of a kind where no regular file stands at a path."""
    match standing(path, kind):
        case "nothing":
            raise kind(f"{path}: no such file; check the path")
        case "folder":
            raise kind(f"{path}: is a folder; a file is needed")


def whole_text(path: Path, kind: type[LillamaError]) -> str:
    """Return a UTF-8 text file as it is, newlines apart.

    Raises:
        LillamaError: of the kind given: it is not there, cannot be read, is larger than 1 GiB or is not UTF-8.
    """
    refuse_no_file(path, kind)
    try:
        if (size := path.stat().st_size) > WHOLE:
            raise kind(f"{path}: {size:,} bytes, and it is read as a whole; give a part of it")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise kind(f"{path}: not UTF-8 at byte {error.start}; convert it") from None
    except OSError as error:
        raise kind(f"{path}: cannot be read ({error.strerror}); check the file and who may read it") from None


def files_below(folder: Path) -> list[Path]:
    """List what is no folder in a folder and all below it, sorted; linked folders are entered too, but none twice.

    Raises:
        DataError: a folder may not be looked at.
    """
    found: list[Path] = []
    entered: set[tuple[int, int]] = set()
    waiting, links = [folder], list[Path]()
    while waiting or links:
        current = waiting.pop() if waiting else links.pop(links.index(min(links)))
        try:
            place = current.stat()
            inside = list(os.scandir(current)) if (place.st_dev, place.st_ino) not in entered else []
        except OSError as error:
            raise DataError(f"{current}: cannot be read ({error.strerror}); check who may read it") from None
        entered.add((place.st_dev, place.st_ino))
        for entry in inside:
            if _is_folder(entry):
                (links if entry.is_symlink() else waiting).append(current / entry.name)
            else:
                found.append(current / entry.name)
    return sorted(found)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle: who reads the file tells
        return False

"""Folders of data that come with lillama, also where the package lies in an archive."""

from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from tempfile import TemporaryDirectory

_unpacked: list[TemporaryDirectory[str]] = []  # kept until the process ends, which removes them


@cache
def package_folder(folder: str) -> Path:
    """Return a folder of the package, by its path within it; one in an archive is unpacked for as long as the process lives."""
    found = files("lillama").joinpath(*folder.split("/"))
    if isinstance(found, Path):
        return found
    _unpacked.append(TemporaryDirectory(prefix="lillama-"))
    target = Path(_unpacked[-1].name)
    _unpack(found, target)
    return target


def _unpack(source: Traversable, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for part in source.iterdir():
        if part.is_dir():
            _unpack(part, target / part.name)
        else:
            (target / part.name).write_bytes(part.read_bytes())

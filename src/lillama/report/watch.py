"""Write a report once, or again and again while its runs go on."""

import time
from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path

from lillama.errors import RecipeError
from lillama.report.artefacts import RESULT, Extra
from lillama.report.page import report, write


def default_place(path: Path) -> Path:
    """Return where the report of a folder goes: into a run folder, or beside a result, which keeps its content."""
    path = path.resolve()
    return path.with_name(f"{path.name}-report.html") if (path / RESULT).is_file() else path / "report.html"


def write_report(paths: Sequence[Path], place: Path, extra: Extra) -> Path:
    """Write the report and return the HTML file's place."""
    return write(report(paths, extra), place)[0]


def watch_runs(
    paths: Sequence[Path], place: Path, extra: Extra, seconds: float, sleep: Callable[[float], None] = time.sleep
) -> Path:
    """Write the report every few seconds until all runs are finished, and return the HTML file's place.

    Raises:
        RecipeError: the seconds are none.
    """
    if not (isfinite(seconds) and seconds > 0):
        raise RecipeError(f"--every is {seconds:g}; it is the seconds between two times, above 0")
    while not (page := report(paths, extra)).finished:
        write(page, place, refresh=seconds)
        sleep(seconds)
    return write(page, place)[0]

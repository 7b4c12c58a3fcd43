"""What commands share: progress while work goes on, tables at the end, or JSON."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import transformers
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from lillama.errors import one_line, plain
from lillama.system.progress import Progress, Report, silent

WORDS = {
    "calibration": "calibration text",
    "fisher": "spectra",
    "rounding": "rounded",
    "steps": "  steps",
    "recover": "recovery",
    "probe": "probed texts",
}


class PlainConsole(Console):
    """A console on which every text, in tables too, is what it says: no markup, no emoji codes, no control characters."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text, its lines as they are, everything else that does not print as an escape."""
        lines = "\n".join(map(plain, text.split("\n")))
        options |= {"markup": False, "emoji": False}
        return super().render_str(lines, **options)


class OneLine(logging.Formatter):
    """Each record on one line that a terminal may show."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return one_line(super().format(record))


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """Yield a function that draws nested bars on standard error; it does nothing when that is no terminal."""
    transformers.utils.logging.disable_progress_bar()
    console = PlainConsole(stderr=True)
    bare = quiet or not console.is_terminal
    handler = logging.StreamHandler() if bare else RichHandler(console=console, show_path=False, show_time=False)
    handler.setFormatter(OneLine("warning: %(message)s" if bare else "%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if bare:
        yield silent
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Bars(*columns, console=console) as bars:
        yield Drawing(bars)


class Drawing:
    """Turn `Progress` values into bars, one for each task; a task that starts anew resets its bar.

    Args:
        bars: to draw on.
    """

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self._tasks: dict[str, tuple[TaskID, float, Progress]] = {}

    def __call__(self, progress: Progress) -> None:
        """Draw one moment; a block that is taught gets a line of its own above the bars."""
        if progress.task == "taught":
            self.bars.console.print(Text(plain(progress.detail)))
            return
        now = time.monotonic()
        if progress.task not in self._tasks:
            task = self.bars.add_task(WORDS.get(progress.task, progress.task), total=progress.total, note="")
            self._tasks[progress.task] = task, now, progress
        task, start, first = self._tasks[progress.task]
        if progress.done < self.bars.tasks[self.bars.task_ids.index(task)].completed:
            self.bars.reset(task)
            start, first = now, progress
            self._tasks[progress.task] = task, start, first
        note = _note(progress, progress.tokens - first.tokens, now - start)
        self.bars.update(task, completed=progress.done, total=progress.total, note=note)


def show(value: Mapping[str, Any], as_json: bool, draw: Callable[[], None]) -> None:
    """Print a value as JSON, in ASCII, so that no output refuses it and nothing in it moves a terminal; or as `draw` does."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2) + "\n")
    else:
        draw()


def say(text: str) -> None:
    """Print a line on standard output."""
    sys.stdout.write(f"{plain(text)}\n")


def print_tables(*tables: Table) -> None:
    """Print tables on standard output."""
    console = PlainConsole()
    for table in tables:
        console.print(table)


def _note(progress: Progress, tokens: int, seconds: float) -> str:
    """Return what stands beside a bar; the rate is that of the tokens since the bar's first moment."""
    rate = f"{tokens / seconds:,.0f} tokens/s" if tokens > 0 and seconds > 0 else ""
    loss = f"loss {progress.loss:.5f}" if progress.loss is not None else ""
    return "  ".join(part for part in (plain(progress.detail), loss, rate) if part)

"""What the command line shows: progress while work goes on, tables at the end, or JSON."""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from lillama.compression import Result
from lillama.evaluate.perplexity import TextScore
from lillama.hub.card import auto_class
from lillama.prepare import Planned
from lillama.progress import Progress, Report, silent
from lillama.resources import readable

WORDS = {"calibration": "calibration text", "blocks": "blocks", "steps": "  steps", "perplexity": "perplexity"}


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """Yield a function that draws nested bars on standard error; it does nothing when that is no terminal."""
    transformers.utils.logging.disable_progress_bar()
    console = Console(stderr=True)
    plain = quiet or not console.is_terminal
    handler = logging.StreamHandler() if plain else RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(
        level=logging.WARNING, format="warning: %(message)s" if plain else "%(message)s", handlers=[handler]
    )
    if plain:
        yield silent
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
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
        """Draw one moment."""
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


def show(value: dict[str, Any], as_json: bool, draw: Callable[[], None]) -> None:
    """Print a value as JSON, or as `draw` does."""
    if as_json:
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    else:
        draw()


def planned(plan: Planned) -> None:
    """Print a rank plan and what it needs."""
    spec, ranks, needs = plan.plan.spec, plan.plan, plan.estimate
    shown = [spec.blocks[index] for index in _some(len(spec.blocks))]
    table = Table("linear", *(f"block {block.index}" for block in shown), title=spec.architecture)
    kinds = {linear.name.removeprefix(f"{block.name}."): linear for block in spec for linear in block.linears}
    for inner, linear in kinds.items():
        cells = (ranks.ranks.get(f"{block.name}.{inner}") for block in shown)
        table.add_row(
            f"{inner} ({linear.out_features} x {linear.in_features})",
            *("dense" if r is None else str(r) for r in cells),
        )
    facts = Table(show_header=False)
    facts.add_row("parameters", f"{spec.params:,} -> {ranks.kept_params:,} ({ranks.keep:.2%} kept)")
    facts.add_row(
        "bytes", f"{readable(spec.params * spec.bytes_per_param)} -> {readable(ranks.kept_bytes)} in {spec.dtype}"
    )
    facts.add_row(
        "memory", f"about {readable(needs.memory_bytes)}, and {readable(needs.activation_bytes)} of activations"
    )
    facts.add_row("disk", f"about {readable(needs.disk_bytes)} for result and run folder")
    facts.add_row("time", f"about {_duration(needs.seconds or 0)} on this machine")
    _print(table, facts)


def compressed(result: Result) -> None:
    """Print what was made, what it costs, and how to load it."""
    spec, ranks = result.plan.spec, result.plan
    table = Table("", "original", "compressed", "", title=str(result.path))
    table.add_row("parameters", f"{spec.params:,}", f"{ranks.kept_params:,}", f"{ranks.keep:.1%}")
    table.add_row(
        "bytes", readable(spec.params * spec.bytes_per_param), readable(ranks.kept_bytes), f"{ranks.keep:.1%}"
    )
    for pair in result.texts:
        before, after = pair.before, pair.after
        change = after.perplexity / before.perplexity - 1
        table.add_row(
            f"perplexity, {before.name}", f"{before.perplexity:.3f}", f"{after.perplexity:.3f}", f"{change:+.1%}"
        )
        table.add_row(f"bits per byte, {before.name}", f"{before.bits_per_byte:.4f}", f"{after.bits_per_byte:.4f}", "")
    table.add_row("time", "", _duration(result.seconds), "")
    table.add_row("peak memory", "", readable(result.peak_bytes), "")
    _print(table)
    loader = f"transformers.{auto_class(spec.architecture)}.from_pretrained({str(result.path)!r})"
    sys.stdout.write(f"import lillama, transformers; model = {loader}\n")


def scores(rows: list[TextScore]) -> None:
    """Print perplexities."""
    table = Table("text", "tokens", "perplexity", "bits per byte")
    for row in rows:
        table.add_row(row.name, f"{row.tokens:,}", f"{row.perplexity:.3f}", f"{row.bits_per_byte:.4f}")
    _print(table)


def _print(*tables: Table) -> None:
    console = Console()
    for table in tables:
        console.print(table)


def _note(progress: Progress, tokens: int, seconds: float) -> str:
    """Return what stands beside a bar; the rate is that of the tokens since the bar's first moment."""
    rate = f"{tokens / seconds:,.0f} tokens/s" if tokens > 0 and seconds > 0 else ""
    loss = f"loss {progress.loss:.5f}" if progress.loss is not None else ""
    return "  ".join(part for part in (progress.detail, loss, rate) if part)


def _some(count: int) -> list[int]:
    """Return a few block indices: first, middle, last."""
    return sorted({0, count // 2, count - 1})


def _duration(seconds: float) -> str:
    for most, unit, name in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < most:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 3600:.1f} h"

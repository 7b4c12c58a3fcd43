"""Figures about the teaching: losses of each block, the error from block to block, recovery."""

from collections.abc import Sequence
from typing import Literal

from lillama.distill.log import BlockLogJson, RowJson
from lillama.report.artefacts import Evidence
from lillama.report.figure import Cell, Figure
from lillama.report.schemas import has
from lillama.report.svg import Axes, Line, Role, chart, with_title

STREAMS: tuple[tuple[Literal[1, 2], str, Role, Role], ...] = (
    (1, "teacher stream", "dense", "dense thin"),
    (2, "student stream", "kept", "kept thin"),
)
MOMENTS: tuple[tuple[Literal["initial", "final"], str, Role], ...] = (
    ("initial", "before teaching", "dense"),
    ("final", "after teaching", "kept"),
)


def losses(evidence: Evidence) -> Figure | None:
    """Draw the loss of each block on both streams while it was taught, and the held-out checks."""
    logs = [log for log in evidence.blocks if log["steps"]]
    if not logs:
        return None
    plots = tuple(with_title(log["block"], _curves(log)) for log in logs)
    return Figure(
        "losses",
        "How each block learned",
        "Training loss (thin) and held-out loss (dots) while the block was taught, on the original's activations (teacher "
        "stream) and on those of the compressed blocks before it (student stream).",
        plots,
        ("block", "steps", "tokens", "held-out loss before", "after", "better by, %", "best step"),
        tuple(map(_row, logs)),
        True,
        ("teacher stream", "student stream"),
    )


def _row(log: BlockLogJson) -> tuple[Cell, ...]:
    initial = log["initial"] if has(log, "initial") else None
    final = log["final"] if has(log, "final") else None
    better = 100 * (1 - final / initial) if initial and final is not None else None
    tokens = log["tokens"] if has(log, "tokens") else None
    return (
        log["block"],
        log["steps"],
        tokens,
        initial,
        final,
        better,
        log["best_step"] if has(log, "best_step") else None,
    )


def _curves(log: BlockLogJson) -> str:
    lines = list[Line]()
    for column, stream, role, thin in STREAMS:
        training = _points(log["curve"], column) if has(log, "curve") else []
        checks = _points(log["held_out"], column) if has(log, "held_out") else []
        lines += [Line(f"training, {stream}", training, thin)] if training else []
        lines += [Line(f"held out, {stream}", checks, role, marks=True, joined=False)] if checks else []
    return chart(f"Losses of {log['block']}", Axes("step", "loss", log_y=True, whole_x=True), lines)


def _points(rows: Sequence[RowJson], column: Literal[1, 2]) -> list[tuple[float, float]]:
    return [(row[0], loss) for row in rows if (loss := row[column]) is not None]


def carried_error(evidence: Evidence) -> Figure | None:
    """Draw the held-out loss of each block before and after teaching."""
    logs = [log for log in evidence.blocks if has(log, "initial") and has(log, "final")]
    if len(logs) < 2:
        return None
    known = {block["name"]: block["index"] for block in evidence.blocks_told}
    places = [known.get(log["block"], place) for place, log in enumerate(logs)]
    lines = [
        Line(name, [(float(place), log[key]) for place, log in zip(places, logs, strict=True)], role, marks=True)
        for key, name, role in MOMENTS
    ]
    axes = Axes("block", "held-out loss", log_y=True, whole_x=True, width=480, height=240)
    return Figure(
        "carried",
        "Error carried from block to block",
        "Held-out loss at each block's output.",
        (chart("Held-out loss of each block before and after teaching", axes, lines),),
        ("block", "before", "after"),
        tuple((log["block"], log["initial"], log["final"]) for log in logs),
        legend=("before teaching", "after teaching"),
    )


def recovery(evidence: Evidence) -> Figure | None:
    """Draw the divergence from the original while all blocks learned together."""
    log = evidence.recovery
    held_out = log["held_out"] if has(log, "held_out") else ()
    training = [(float(step), value) for step, value, _ in (log["curve"] if has(log, "curve") else ())]
    checks = [(float(row[0]), row[1]) for row in held_out]
    if not training and not checks:
        return None
    axes = Axes("step", "KL, nats", whole_x=True, zero_y=True, width=480, height=240)
    lines = [Line("training", training, "kept thin"), Line("held out", checks, "kept", marks=True)]
    return Figure(
        "recovery",
        "Recovery",
        "Divergence of the next token from the original's, while all compressed blocks learned together: training (thin) "
        "and held out (dots).",
        (chart("Divergence during recovery", axes, lines),),
        ("step", "KL, nats", "cross-entropy, nats", "norm against the original"),
        tuple(tuple(row) for row in held_out),
        legend=(),
    )

"""Charts whose rows have names: paired bars, a heat map, a dumbbell plot."""

from collections.abc import Sequence
from dataclasses import dataclass

from lillama.report.svg import Scale, box, drawing, mark, short, text

ROW, LETTER = 22, 8.6  # heights and widths, in the units of the drawing
TINT = 50  # per cent of the full colour at most, so that words on it can be read in light and in dark


@dataclass(frozen=True)
class ChartPair:
    """A named row with the original's value and the compressed one's; None where there is none."""

    label: str
    dense: float | None
    kept: float | None


def bars(title: str, unit: str, pairs: Sequence[ChartPair], width: int = 440) -> str:
    """Draw for each pair the original's bar, and the compressed one's thinner one within it."""
    left = _margin([pair.label for pair in pairs])
    values = [value for pair in pairs for value in (pair.dense, pair.kept) if value is not None]
    scale, room = Scale(0.0, max([*values, 1e-30])), width - left - 12
    body = []
    for index, pair in enumerate(pairs):
        y = index * ROW
        body.append(text(left - 8, y + 15, pair.label, "end"))
        for value, role, top, height in ((pair.dense, "dense", 2, 18), (pair.kept, "kept", 6, 10)):
            if value is not None:
                words = f"{pair.label}, {'original' if role == 'dense' else 'compressed'}: {value:,.4g} {unit}"
                body.append(box(left, y + top, scale(value) * room, height, f"bar {role}", words))
    return drawing(title, width, len(pairs) * ROW + 18, [*body, *_ticks(scale, left, room, len(pairs) * ROW, unit)])


def dumbbells(title: str, pairs: Sequence[ChartPair], chance: float, width: int = 440) -> str:
    """Draw two dots for each pair, joined by a line, on an axis from 0 to 1 with a line at chance."""
    left = _margin([pair.label for pair in pairs])
    room, bottom = width - left - 40, len(pairs) * ROW
    body = [f'<path class="chance" d="M{left + chance * room:.1f} 0V{bottom}"><title>chance</title></path>']
    for index, pair in enumerate(pairs):
        y = index * ROW + 11
        body.append(text(left - 8, y + 4, pair.label, "end"))
        if pair.dense is not None and pair.kept is not None:
            ends = sorted((pair.dense, pair.kept))
            body.append(f'<path class="grid strong" d="M{left + ends[0] * room:.1f} {y}H{left + ends[1] * room:.1f}"/>')
        if pair.dense is not None:
            body.append(mark(left + pair.dense * room, y, "dense", f"{pair.label}, original: {pair.dense:.1%}", 6))
        if pair.kept is not None:
            body.append(mark(left + pair.kept * room, y, "kept", f"{pair.label}, compressed: {pair.kept:.1%}"))
    ticks = [text(left + tick * room, bottom + 14, f"{tick:.0%}", "middle") for tick in (0, 0.25, 0.5, 0.75, 1.0)]
    return drawing(title, width, bottom + 18, [*body, *ticks])


def heat(title: str, names: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[float | None]]) -> str:
    """Draw a map of shares from 0 to 1, a row for each name; None stays empty.

    Args:
        title: accessible name.
        names: of the rows.
        columns: heads.
        cells: of each row.
    """
    left, side = _margin(names), 34 if len(columns) <= 16 else 18
    body = [
        text(left + (index + 0.5) * side, 12, head, "middle")
        for index, head in enumerate(columns)
        if _has_label(index, side)
    ]
    for row, name in enumerate(names):
        y = 18 + row * ROW
        body.append(text(left - 8, y + 15, name, "end"))
        for column, share in enumerate(cells[row]):
            if share is None:
                continue
            words, style = f"{name}, block {columns[column]}: {share:.1%}", f"--share: {TINT * share:.0f}%"
            body.append(box(left + column * side, y, side - 1, ROW - 1, "cell", words, style))
            if side > 30:
                body.append(text(left + (column + 0.5) * side, y + 15, f"{100 * share:.0f}", "middle", "strong"))
    return drawing(title, left + len(columns) * side + 4, 22 + len(names) * ROW, body)


def _has_label(index: int, side: int) -> bool:
    return side > 30 or index % 4 == 0


def _margin(names: Sequence[str]) -> float:
    return 12 + LETTER * max([len(name) for name in names], default=0)


def _ticks(scale: Scale, left: float, room: float, y: float, unit: str) -> list[str]:
    ticks = scale.ticks()
    words = [short(tick) + (f" {unit}" if tick == ticks[-1] else "") for tick in ticks]
    return [
        text(left + scale(tick) * room, y + 14, word, "end" if scale(tick) > 0.9 else "middle")
        for tick, word in zip(ticks, words, strict=True)
    ]

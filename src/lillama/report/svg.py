"""Small charts as inline SVG; their colours come from the page's style sheet, for light, dark and print."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Role = Literal["dense", "kept", "kept faint", "kept thin", "dense thin"]  # classes of the style sheet
Point = tuple[float, float]
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 24, 36


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic axis over `[low, high]`."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float], log: bool = False, zero: bool = False) -> "Scale":
        """Return the scale that holds all values; a logarithmic one holds the positive ones."""
        found = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
        low, high = (0.0 if zero and not log else min(found)), max(found)
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        return cls(low, high, log)

    def widened(self, share: float, below: bool = True) -> "Scale":
        """Return a linear scale with room beyond its ends."""
        more = share * (self.high - self.low)
        return Scale(self.low - more if below else self.low, self.high + more, self.log)

    def __call__(self, value: float) -> float:
        """Return the place of a value: 0 at the low end, 1 at the high one."""
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """Return a few round values within the scale.

        Examples:
            >>> Scale(0.0, 10.0).ticks()
            [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
            >>> Scale(0.02, 3.0, log=True).ticks()
            [0.1, 1.0]
        """
        if self.log and self.high / self.low >= 100:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1, max(1, (last - first) // 4))]
        raw = (self.high - self.low) / 4
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw * 0.8)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: for the legend and the values on hover.
        points: x and y.
        role: what it stands for, which decides its colour.
        marks: whether each point is drawn.
        joined: whether a line goes through the points.
        label: what stands beside the last point.
    """

    name: str
    points: Sequence[Point]
    role: Role
    marks: bool = False
    joined: bool = True
    label: str = ""


@dataclass(frozen=True)
class Axes:
    """What stands beside the axes, how they run, and the size of the drawing.

    Attributes:
        room: share of a linear axis that is left free beyond the values, for words beside them.
    """

    x: str
    y: str
    log_y: bool = False
    whole_x: bool = False
    zero_y: bool = False
    room: float = 0.0
    width: int = 360
    height: int = 220


def chart(title: str, axes: Axes, lines: Sequence[Line]) -> str:
    """Draw curves over common axes."""
    points = [point for line in lines for point in line.points]
    width, height = axes.width, axes.height
    across = Scale.over((x for x, _ in points)).widened(axes.room)
    up = Scale.over((y for _, y in points), axes.log_y, axes.zero_y).widened(axes.room, below=not axes.zero_y)

    def place(point: Point) -> Point:
        return LEFT + across(point[0]) * (width - LEFT - RIGHT), height - BOTTOM - up(point[1]) * (
            height - TOP - BOTTOM
        )

    body = [text(width - RIGHT, height - 4, axes.x, "end"), text(4, 12, axes.y)]
    for tick in up.ticks():
        _, y = place((across.low, tick))
        body += [f'<path class="grid" d="M{LEFT} {y:.1f}H{width - RIGHT}"/>', text(LEFT - 6, y + 4, short(tick), "end")]
    for tick in across.ticks():
        if not axes.whole_x or tick == int(tick):
            body.append(text(place((tick, up.low))[0], height - BOTTOM + 16, short(tick), "middle"))
    body += [_line(line, place, axes) for line in lines]
    return drawing(title, width, height + 4, body)


def _line(line: Line, place: Callable[[Point], Point], axes: Axes) -> str:
    shown = [point for point in line.points if math.isfinite(point[1]) and (point[1] > 0 or not axes.log_y)]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in map(place, shown))
    stroke = f'<path class="line {line.role}" d="M{path}"><title>{escape(line.name)}</title></path>'
    parts = [stroke] if path and line.joined else []
    if line.marks:
        parts += [mark(*place((x, y)), line.role, f"{line.name}: {axes.x} {x:g}, {axes.y} {y:.4g}") for x, y in shown]
    if line.label and shown:
        x, y = place(shown[-1])
        parts.append(text(x, y - 8, line.label, "middle", "strong"))
    return "".join(parts)


def drawing(title: str, width: float, height: float, body: Iterable[str]) -> str:
    """Return an SVG element with an accessible name."""
    inner = "".join(body)
    return f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {width:g} {height:g}" width="{width:g}">{inner}</svg>'


def alone(svg: str, style: str, border: int = 12) -> str:
    """Return a drawing as a file of its own, on a ground of its own, so that it can be read on any page."""
    head, _, inner = svg.partition(">")
    width, height = (float(size) for size in head.partition('viewBox="0 0 ')[2].partition('"')[0].split())
    wide, high = width + 2 * border, height + 2 * border
    name = head.partition('aria-label="')[2].partition('"')[0]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{name}" width="{wide:g}" height="{high:g}" '
        f'viewBox="{-border} {-border} {wide:g} {high:g}">\n<style>\n{style}</style>\n'
        f'<rect x="{-border}" y="{-border}" width="{wide:g}" height="{high:g}" fill="#fff"/>\n{inner}\n'
    )


def with_title(heading: str, svg: str) -> str:
    """Return a drawing under a heading of its own."""
    return f"<div><h3>{escape(heading)}</h3>{svg}</div>"


def short(value: float) -> str:
    """Return a number as it stands at an axis.

    Examples:
        >>> short(0.0), short(0.002), short(200_000.0), short(1_500_000.0)
        ('0', '0.002', '200k', '1.5M')
    """
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * unit or (abs(value) >= unit and unit > 1e3):
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def text(x: float, y: float, words: str, anchor: str = "start", role: str = "") -> str:
    """Return a piece of text at its anchor."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{role}">{escape(words)}</text>'


def mark(x: float, y: float, role: Role, words: str, radius: float = 4) -> str:
    """Return a dot that tells its value on hover."""
    return (
        f'<circle class="mark {role}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"><title>{escape(words)}</title></circle>'
    )


def box(x: float, y: float, width: float, height: float, role: str, words: str, style: str = "") -> str:
    """Return a rectangle that tells its value on hover."""
    size = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}"'
    return f'<rect class="{role}" {size} style="{style}"><title>{escape(words)}</title></rect>'

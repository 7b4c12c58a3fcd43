"""A figure of the page: drawings, and the same figures as a table."""

from dataclasses import dataclass

Cell = str | float | int | None


@dataclass(frozen=True)
class Figure:
    """One section of the page.

    Attributes:
        key: short name, for links and for JSON.
        title: heading.
        note: how to read it.
        plots: SVG elements.
        columns: heads of the table.
        rows: of the table.
        small: whether the drawings stand side by side.
        legend: what the two colours stand for; empty where there is one alone.
    """

    key: str
    title: str
    note: str
    plots: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    small: bool = False
    legend: tuple[str, ...] = ("original", "compressed")


def shown(cell: Cell) -> str:
    """Return a cell for the reader.

    Examples:
        >>> shown(1234567), shown(0.0123456), shown(None)
        ('1,234,567', '0.01235', '')
    """
    if cell is None:
        return ""
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.4g}" if isinstance(cell, float) else cell

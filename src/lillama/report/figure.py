"""A figure of the page: drawings or passages of text, and the same as a table."""

from dataclasses import dataclass

Cell = str | float | int | None


@dataclass(frozen=True)
class Passage:
    """What the original and the compressed model write after one prompt.

    Attributes:
        source: name of the text that the prompt was cut from.
        prompt: what both were given.
        same: what both write until they part.
        dense: how the original goes on from there.
        kept: how the compressed model does.
    """

    source: str
    prompt: str
    same: str
    dense: str
    kept: str


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
        open: whether the table is open at first.
        legend: what the two colours stand for; empty where there is one alone.
        passages: shown side by side instead of the table.
    """

    key: str
    title: str
    note: str
    plots: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    small: bool = False
    legend: tuple[str, ...] = ("original", "compressed")
    passages: tuple[Passage, ...] = ()
    open: bool = False


def format_cell(cell: Cell) -> str:
    """Return a cell for the reader.

    Examples:
        >>> format_cell(1234567), format_cell(0.0123456), format_cell(None)
        ('1,234,567', '0.01235', '')
    """
    if cell is None:
        return ""
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:.4g}" if isinstance(cell, float) else cell

"""The report as one HTML file, as Markdown and as JSON."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lillama.files.publishing import escape_markdown, markdown_templates, public_recipe
from lillama.report import learning, measures, structure, summary
from lillama.report.artefacts import Evidence, Extra, collect
from lillama.report.figure import Cell, Figure, format_cell
from lillama.report.place import places, write_all
from lillama.report.warnings import doubts

VERSION = 1
BROKEN = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)  # of a damaged artefact
FIGURES: tuple[Callable[[Evidence], Figure | None], ...] = (
    structure.sizes,
    structure.ranks,
    structure.bits,
    structure.spectra,
    learning.losses,
    learning.carried_error,
    learning.recovery,
    measures.evaluation,
    measures.samples,
    measures.probing,
    measures.speed,
)


@dataclass(frozen=True)
class Chapter:
    """What the page tells of one compression."""

    name: str
    headline: str
    facts: tuple[summary.FactRow, ...]
    doubts: tuple[str, ...]
    missing: tuple[str, ...]
    figures: tuple[Figure, ...]
    origin: tuple[tuple[str, str], ...]
    recipe: str

    def as_json(self) -> dict[str, Any]:
        """Return JSON values; drawings are left out."""
        return {
            "name": self.name,
            "headline": self.headline,
            "facts": [dict(zip(("name", "original", "compressed", "change"), row, strict=True)) for row in self.facts],
            "warnings": list(self.doubts),
            "missing": list(self.missing),
            "figures": {figure.key: _table(figure) for figure in self.figures},
            "origin": dict(self.origin),
        }


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        title: heading.
        chapters: one for each compression.
        compared: quality against size, where there are several.
        finished: whether no run is still going on.
    """

    title: str
    chapters: tuple[Chapter, ...]
    compared: Figure | None
    finished: bool

    def as_json(self) -> dict[str, Any]:
        """Return JSON values; `version` counts their breaking changes."""
        found = {"version": VERSION, "models": [chapter.as_json() for chapter in self.chapters]}
        return found | ({"compared": _table(self.compared)} if self.compared else {})

    def as_html(self, refresh: float | None = None) -> str:
        """Return a self-contained page.

        Args:
            refresh: seconds after which a browser reads it again.
        """
        here = files("lillama.report")
        plots, rest, script = (
            here.joinpath(name).read_text(encoding="utf-8") for name in ("plot.css", "page.css", "page.js")
        )
        style = plots + rest
        return _render("page.html.jinja", page=self, style=style, script=script, refresh=refresh)

    def as_markdown(self) -> str:
        """Return the tables as Markdown."""
        return _render("page.md.jinja", page=self)


def report(paths: Sequence[Path], extra: Extra | None = None) -> Page:
    """Read results and run folders, and tell what they say.

    Args:
        paths: results' folders or run folders.
        extra: what the other commands printed about the first of them.

    Raises:
        OutputError: a folder is neither.
    """
    found = [collect(path, extra if index == 0 else None) for index, path in enumerate(paths)]
    try:
        compared = measures.comparison(found)
    except BROKEN:
        compared = None
    finished = all(evidence.finished for evidence in found)
    return Page(summary.shared_title(found), tuple(map(_chapter, found)), compared, finished)


def write(page: Page, out: Path, refresh: float | None = None) -> tuple[Path, Path, Path]:
    """Write a report beside `out`, with the suffixes .html, .md and .json, and return the three places.

    Raises:
        OutputError: something else than an earlier report stands at one of them.
    """
    html, markdown, value = places(out)
    text = json.dumps(page.as_json(), indent=2, ensure_ascii=False)
    write_all({html: page.as_html(refresh), markdown: page.as_markdown(), value: text})
    return html, markdown, value


def _chapter(evidence: Evidence) -> Chapter:
    missing = list(evidence.missing)

    def told(what: str, tell: Callable[[Evidence], Any], instead: Any) -> Any:
        try:
            return tell(evidence)
        except BROKEN as error:
            missing.append(f"{what}: an artefact has not the form that was expected ({type(error).__name__}: {error})")
            return instead

    figures = [told(draw.__name__, draw, None) for draw in FIGURES]
    headline, facts = told("headline", summary.headline, ""), told("main table", summary.facts, ())
    warnings = told("warnings", lambda known: tuple(doubts(known)), ())
    origin, recipe = told("origin", summary.origin, ()), told("recipe", lambda known: known.recipe, {})
    shown_recipe = yaml.safe_dump(public_recipe(recipe), sort_keys=False) if recipe else ""
    return Chapter(
        evidence.name,
        headline,
        facts,
        warnings,
        tuple(missing),
        tuple(figure for figure in figures if figure),
        origin,
        shown_recipe,
    )


def _table(figure: Figure) -> dict[str, Any]:
    rows = [[None if isinstance(cell, float) and not isfinite(cell) else cell for cell in row] for row in figure.rows]
    return {"title": figure.title, "columns": list(figure.columns), "rows": rows}


def _render(template: str, **values: Any) -> str:
    templates = _templates() if template.endswith(".html.jinja") else _markdown()
    return templates.get_template(template).render(values | {"columns": summary.COLUMNS})


@cache
def _templates() -> Environment:
    """Return the environment of the page's template, which is compiled once."""
    environment = Environment(
        loader=PackageLoader("lillama.report", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    environment.filters |= {"shown": format_cell, "number": _is_number}
    return environment


@cache
def _markdown() -> Environment:
    environment = markdown_templates("lillama.report")
    environment.filters["cell"] = lambda cell: Markup(escape_markdown(format_cell(cell)))
    return environment


def _is_number(cell: Cell) -> bool:
    return isinstance(cell, int | float)

"""Write the tables of docs/recipes.md from the dataclasses, so that the page cannot drift from the code.

`python docs/recipe_table.py` writes them between the markers; `--check` only tells whether they are up to date.
"""

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from lillama.cli.process import quieten  # before what it is to keep quiet

quieten()

from lillama.corpus.sources import Source
from lillama.recipes.recipe import Recipe, load_recipe, recipe_names

PAGE = Path(__file__).with_name("recipes.md")
BEGIN, END = "<!-- begin: written by docs/recipe_table.py -->", "<!-- end -->"
WORDS = {float: "number", int: "whole number", str: "text", bool: "true or false"}
BOUNDS = {Gt: ("above", "gt"), Ge: ("at least", "ge"), Lt: ("below", "lt"), Le: ("at most", "le")}


def tables() -> str:
    """Return all generated Markdown."""
    strategies = "\n".join(_strategy(key, kind) for key, kind in _strategies(Recipe))
    return "\n".join(
        [
            "## All keys\n",
            _keys(_rows(Recipe, "")),
            "## Strategies\n\nA key that takes a strategy is a mapping with its `name` and the keys below.\n",
            strategies,
            "### `calibration.sources`\n\nA list; each entry has these keys.\n",
            _keys(_rows(Source, "")),
            "## The recipes that come with lillama\n\n`default` is the table above. The others differ from it in this:\n",
            "\n".join(_difference(name) for name in recipe_names() if name != "default"),
        ]
    )


def _keys(rows: Iterator[tuple[str, str, str, str]]) -> str:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _rows(kind: type, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield key, value, default and meaning of every field, nested dataclasses written out."""
    hints, meanings = get_type_hints(kind, include_extras=True), _meanings(kind)
    for field in fields(kind):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from _rows(hint, f"{prefix}{field.name}.")
        elif field.name != "name" or prefix:
            yield f"`{prefix}{field.name}`", _value(hint), _default(field), meanings.get(field.name, "")


def _strategies(kind: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield key and class of every strategy that a recipe can name."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if is_dataclass(hint):
            yield from _strategies(hint, f"{prefix}{name}.")
        else:
            yield from ((f"{prefix}{name}", option) for option in _options(hint))


def _options(hint: Any) -> list[type]:
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [member for member in members if is_dataclass(member) and isinstance(member, type)]


def _strategy(key: str, kind: type) -> str:
    name = next(field.default for field in fields(kind) if field.name == "name")
    summary = (inspect.getdoc(kind) or "").split("\n\n")[0]
    rows = list(_rows(kind, ""))
    return f"### `{key}: {{name: {name}}}`\n\n{summary}\n" + ("\n" + _keys(iter(rows)) if rows else "")


def _value(hint: Any) -> str:
    """Say in words what a key takes."""
    if get_origin(hint) is Annotated:
        inner, *notes = get_args(hint)
        limits = [bound for note in notes for bound in (note.metadata if isinstance(note, FieldInfo) else [note])]
        said = [f"{BOUNDS[type(b)][0]} {getattr(b, BOUNDS[type(b)][1])}" for b in limits if type(b) in BOUNDS]
        return ", ".join([_value(inner), " and ".join(said)] if said else [_value(inner)])
    if get_origin(hint) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        names = [_name(member) for member in get_args(hint) if is_dataclass(member)]
        return " or ".join(names or [_value(member) for member in get_args(hint)])
    if get_origin(hint) is tuple:
        inner = [a for a in get_args(hint) if a is not Ellipsis]
        if Ellipsis in get_args(hint):
            return "list of sources" if is_dataclass(inner[0]) else f"list of {_value(inner[0])}s"
        return f"{len(inner)} {_value(inner[0])}s"
    return "`null`" if hint is NoneType else WORDS[hint]


def _name(kind: Any) -> str:
    return f"`{next(field.default for field in fields(kind) if field.name == 'name')}`"


def _default(field: Any) -> str:
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if value is MISSING:
        return ""
    return _name(type(value)) if is_dataclass(value) else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _meanings(kind: type) -> dict[str, str]:
    """Read the `Attributes:` of a docstring: name -> text on one line."""
    section = (inspect.getdoc(kind) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
    said = {name: " ".join(text.split()).removesuffix(".") for name, text in entries}
    return {name: re.sub(r"\bNone\b", "`null`", text) for name, text in said.items()}


def _difference(name: str) -> str:
    default, other = _flat(load_recipe("default").as_dict()), _flat(load_recipe(name).as_dict())
    lines = [f"### `{name}`\n", f"| key | default | {name} |", "|---|---|---|"]
    for key in sorted(default.keys() | other.keys(), key=list(default | other).index):
        if default.get(key) != other.get(key):
            cells = [f"`{_yaml(tree[key])}`" if key in tree else "" for tree in (default, other)]
            lines.append(f"| `{key}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def main() -> None:
    """Write the page, or with `--check` compare it."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    wanted = f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"
    if "--check" not in sys.argv:
        PAGE.write_text(wanted, encoding="utf-8")
    elif text != wanted:
        sys.exit(f"{PAGE}: does not tell the recipes of this code; run `make docs`")


if __name__ == "__main__":
    main()

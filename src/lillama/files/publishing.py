"""What is told to others: words of third parties as mere text in Markdown, names without the paths of this machine."""

import re
from collections.abc import Mapping
from html import unescape
from pathlib import Path, PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

LONGEST = 1000  # characters of a name, a licence, a sample
SIGNS = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")
STARTS = re.compile(r"#|[-+](?=\s|$)|[-=]{2,}|\d+(?=[.)](\s|$))")  # headings, lists, rules: only at the start of a line
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def plain(text: object) -> str:
    r"""Return text as one line of printable characters, shortened where it is no name any more.

    >>> plain("a\nb\x1b[2J")
    'a b [2J'
    """
    line = " ".join("".join(one if one.isprintable() else " " for one in str(text)).split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def escape_markdown(text: object) -> str:
    r"""Return text as Markdown that shows just this text: no heading, link, emphasis, table, HTML.

    >>> escape_markdown("[a](https://b.c) | <b> *d* e_f -1.5")
    '\\[a\\](https&#58;//b.c) \\| &lt;b&gt; \\*d\\* e_f -1.5'
    >>> escape_markdown("# a"), escape_markdown("- a"), escape_markdown("1. a")
    ('\\# a', '\\- a', '1\\. a')
    """
    line = plain(text)
    line = SIGNS.sub(lambda sign: f"\\{sign[0]}", line.replace("&", "&amp;"))
    line = line.replace("<", "&lt;").replace(">", "&gt;")
    line = line.replace("://", "&#58;//").replace("www.", "www&#46;").replace("@", "&#64;")
    start = STARTS.match(line)
    if start is None:
        return line
    return f"{start[0]}\\{line[start.end() :]}" if start[0].isdigit() else f"\\{line}"


def unescape_markdown(markdown: str) -> str:
    r"""Return the text that `escaped` was given, as one line.

    >>> unescape_markdown(escape_markdown("a_[b] & <c>"))
    'a_[b] & <c>'
    """
    return unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown))


def as_code(text: object) -> Markup:
    """Return text for a span of code: backticks would end it."""
    return Markup(plain(text).replace("`", "'"))


def as_code_block(text: str, language: str) -> Markup:
    """Return lines as a block of code, whose fence is longer than any in them."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    body = "".join(one if one.isprintable() or one == "\n" else " " for one in text.strip())
    return Markup(f"{fence}{language}\n{body}\n{fence}")


def markdown_templates(package: str) -> Environment:
    """Return an environment for Markdown: every value is escaped that is not marked as Markdown already."""

    def told(value: object) -> Markup:
        return value if isinstance(value, Markup) else Markup(escape_markdown(value))

    environment = Environment(
        loader=PackageLoader(package, ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
        finalize=told,
    )
    environment.filters |= {"told": told, "coded": as_code, "fenced": as_code_block}
    return environment


def public_name(path: str) -> str:
    """Return a hub id as it is, and of anything that lies on this machine the last part of its path alone."""
    on_hub = HUB_ID.fullmatch(path) and not Path(path).exists()
    return path if on_hub else PurePath(path).name or "a folder"


def public_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's nested values with the sources of calibration text by their public names."""
    calibration = recipe.get("calibration")
    sources = calibration.get("sources") if isinstance(calibration, Mapping) else None
    if not isinstance(calibration, Mapping) or not isinstance(sources, list | tuple):
        return dict(recipe)
    named = [
        one | {"path": public_name(str(one["path"]))} if isinstance(one, dict) and "path" in one else one
        for one in sources
    ]
    return dict(recipe) | {"calibration": dict(calibration) | {"sources": named}}

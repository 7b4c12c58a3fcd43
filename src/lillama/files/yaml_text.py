"""YAML from whoever wrote it: bounded in size, depth and repetition, and every fault of it is one line."""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode

from lillama.errors import LillamaError, RecipeError

LONGEST = 1 << 18  # characters of a document; PyYAML reads about as many in a second
DEEPEST = 50  # nodes inside each other
MOST = 100_000  # nodes of a document whose aliases are written out
LONGEST_NUMBER = 64  # characters; PyYAML's arithmetic on `1:59:59:...` is quadratic
UNREADABLE = (ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError)  # by PyYAML's constructors
HALF = re.compile("[\ud800-\udfff]")  # an escape such as "\ud83d" without the other half
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def load_yaml(text: str, name: str, kind: type[LillamaError] = RecipeError) -> Any:
    """Return the values of one YAML document, read safely and within bounds; None for an empty one.

    Args:
        text: the document.
        name: of the file, for the error.
        kind: of the error.

    Raises:
        LillamaError: of the kind given: the text is no YAML, a value does not fit its tag, or the document is too long,
            too deep, or larger than it looks, by aliases of aliases.

    Examples:
        >>> load_yaml("keep: 1e-1", "r.yaml")
        {'keep': 0.1}
        >>> load_yaml("keep: 2024-13-45", "r.yaml")
        Traceback (most recent call last):
            ...
        lillama.errors.RecipeError: r.yaml: not readable as YAML: line 1, column 7: '2024-13-45' is no timestamp
    """
    try:
        loader = _Loader(_refuse_long(text))
        node = loader.get_single_node()
        if node is None:
            return None
        _count_nodes(node, {})
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise kind(f"{name}: not readable as YAML: {_line(error)}") from None


def read_yaml(path: Path, kind: type[LillamaError] = RecipeError) -> Any:
    """Return the values of a UTF-8 file of one YAML document, as `load_yaml`; no more of it is read than that takes.

    Raises:
        LillamaError: of the kind given: the file is not UTF-8, or as for `load_yaml`.
    """
    return load_yaml(_read(path, kind), str(path), kind)


def refuse_unbounded(path: Path, kind: type[LillamaError] = RecipeError) -> None:
    """Refuse a file that `load_yaml` finds too long, too deep or too large, before others read it with tags of their own.

    Raises:
        LillamaError: of the kind given.
    """
    try:
        node = _Loader(_refuse_long(_read(path, kind))).get_single_node()
        if node is not None:
            _count_nodes(node, {})
    except yaml.YAMLError as error:
        raise kind(f"{path}: not readable as YAML: {_line(error)}") from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-3` is a number, as everybody means it, and depth has a bound."""

    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """Compose a node, unless it lies too deep."""
        if self.depth == DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"nested more than {DEEPEST} deep", problem_mark=self.peek_event().start_mark
            )
        self.depth += 1
        node = super().compose_node(parent, index)  # pyright: ignore[reportArgumentType]  (None stands for the root)
        self.depth -= 1
        return node

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        """Return the value of a node; one that does not fit its tag is an error of YAML, whatever PyYAML raises."""
        if isinstance(node, ScalarNode) and node.tag in NUMBERS and len(node.value) > LONGEST_NUMBER:
            raise _misfit(node)
        if isinstance(node, ScalarNode) and HALF.search(node.value):
            raise yaml.MarkedYAMLError(problem="half of a surrogate pair is no text", problem_mark=node.start_mark)
        try:
            return super().construct_object(node, deep)
        except UNREADABLE:
            raise _misfit(node) from None


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _count_nodes(node: Node, known: dict[int, int]) -> int:
    """Return the number of nodes below and with `node`, aliases written out.

    Args:
        node: to be counted.
        known: id of a node -> its number; 0 while it is counted.
    """
    if id(node) not in known:
        known[id(node)] = 0
        known[id(node)] = 1 + sum(_count_nodes(child, known) for child in _children(node))
    count = known[id(node)]
    if not 0 < count <= MOST:
        much = f"more than {MOST} values when its aliases are written out" if count else "an alias of what it lies in"
        raise yaml.MarkedYAMLError(problem=much, problem_mark=node.start_mark)
    return count


def _children(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [part for pair in node.value for part in pair]
    return [] if isinstance(node, ScalarNode) else node.value


def _read(path: Path, kind: type[LillamaError]) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(LONGEST + 1)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise kind(f"{path}: not readable as YAML: byte 0x{byte:02x} is not UTF-8; convert it") from None


def _refuse_long(text: str) -> str:
    if len(text) > LONGEST:
        raise yaml.YAMLError(f"{len(text)} characters, more than the {LONGEST} that are read; shorten it")
    return text


def _misfit(node: Node) -> yaml.MarkedYAMLError:
    value = repr(node.value) if isinstance(node, ScalarNode) else "this"
    value = value if len(value) <= LONGEST_NUMBER else f"{value[:LONGEST_NUMBER]}..."
    return yaml.MarkedYAMLError(problem=f"{value} is no {node.tag.rpartition(':')[2]}", problem_mark=node.start_mark)


def _line(error: yaml.YAMLError) -> str:
    """Return where and what in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        return f"line {mark.line + 1}, column {mark.column + 1}: {what}"
    return " ".join(str(error).split())

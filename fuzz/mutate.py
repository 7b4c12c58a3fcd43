"""Sound values made unsound: JSON and YAML node by node, safetensors tensor by tensor, any file byte by byte."""

import json
from copy import deepcopy
from random import Random
from typing import Any

Place = tuple[Any, ...]

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 0.5, -0.0, 1e-300, 1e308, 2**31, 2**63, -(2**63), 10**30, 10**400,
    "", "x", "7", "-1", "nan", "lillama", "float16", "torch.float8_e4m3fn", "../../x", "/etc/passwd", "a/b", ".", "*",
    "x" * 100_000, "\ud800", "\x00", "\x1b[31m\x07", "\u202e\n\r\t", "[bold]x[/]", "[/x]", "<b>x", "{{ x }}", "{% x %}",
    [], [None], ["x"], [[]], [1, "x"], [-1] * 3, [0] * 1000, {}, {"x": 1}, {"": None}, {"type": "x"}, {"name": []},
)  # fmt: skip
# What no JSON value can say, written in the place of one.
RAW_JSON = (
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "-" + "9" * 5000, "1." + "0" * 5000, "01", "1_0", "+1",
    "[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"x":' * 50_000 + "1" + "}" * 50_000, "[" * 900 + "]" * 900,
    '{"a": 1, "a": 2}', '"\\ud83d"', '"\\u0000"', "'x'", "None", "tru", "", ",", "}", "]", '"', "// x", "\x00", "\ufeff",
)  # fmt: skip
RAW_YAML = (
    "*none", "&a [*a]", "&a {x: *a}", "{<<: [x]}", "{<<: *none}", "{? [1, 2] : 3}", "!!int abc", "!!float abc",
    "!!bool abc", "!!timestamp abc", "!!binary '='", "!!set {a, b}", "!!omap [1]", "!!pairs [1]", "!x 1", "!!python/none x",
    '!!python/object/apply:os.system ["exit 7"]', "2024-13-45", "2024-01-01", "2024-01-01T99:99:99Z", "1:30:40", "0x1F",
    "0b11", "017", ".nan", ".inf", "-.inf", "1e-3", "1e999", "9" * 5000, "9" * 1000 + ":59", "yes", "~", "=", "<<", "!!null x",
    "[" * 3000, "[" * 3000 + "]" * 3000, "{x: " * 3000 + "1" + "}" * 3000, "'", '"\\q"', "@x", "`x`", "%x", "|", "\t",
    "[&n0 [" + ",".join(["x"] * 9) + "]" + "".join(f",&n{i + 1} [" + ",".join([f"*n{i}"] * 9) + "]" for i in range(9)) + "]",
    "\n--- x\n--- y\n", "\n...\n", "\n? ", "\x00", "\x07", "\ufeff", "\ud800",
)  # fmt: skip
STRAY = (b"\x00", b"\xff", b"\xed\xa0\x80", b"\r", b'"', b"{", b"\x1b[2J")  # bytes within a file
FIRST = (b"\xef\xbb\xbf", b"\xff\xfe", b"\x00" * 100, b"\x1f\x8b")  # before it
WHOLE = (b"", b" ", b"null", b"[]", b"{}", b'"x"', b"7", b"-", b"\x00", b"[" * 100_000)  # in its place
# Numbers of a tensor, in fp32: 0, tiny, NaN, large, infinite, NaN, 1e30; None is anything at all.
FILLINGS = (b"\x00", b"\x01", b"\xff", b"\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\xca\xf2\x49\x71", None)
NAMES = ("x", "", "\ud800", "a.b", "x" * 1000, "\x1b[1m")  # of keys


def mutated(text: str, chance: Random, raw: tuple[str, ...] = RAW_JSON, within: Place = ()) -> str:
    """Return a JSON text with one to three of its values changed.

    Args:
        text: sound JSON.
        chance: decides everything.
        raw: texts that may stand in the place of a value.
        within: place of the only value that is changed, with all that it holds.
    """
    root = {"": json.loads(text)}
    fragments: dict[str, str] = {}
    for _ in range(chance.choices((1, 2, 3), (6, 2, 1))[0]):
        place = _place(root, ("", *within), chance)
        _change(_at(root, place[:-1]), place[-1], root, chance, raw, fragments)
        if "" not in root or (within and within[0] not in root[""]):
            break
    result = json.dumps(root.get("", ""), ensure_ascii=chance.random() < 0.5)
    for mark, fragment in fragments.items():
        result = result.replace(json.dumps(mark), fragment)
    return result


def _place(root: Any, place: Place, chance: Random) -> Place:
    """Return the place of a value in or below `place`; a value among few is met more often than one among many."""
    value = _at(root, place)
    steps = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    if not steps or chance.random() < 0.1:
        return place
    return _place(root, (*place, chance.choice(steps)), chance)


def mutated_bytes(data: bytes, chance: Random) -> bytes:
    """Return a file's content with bytes flipped, lost, added, or in another encoding."""
    start, length = chance.randrange(len(data) + 1), chance.choice((1, 1, 8, 100))
    before, some, after = data[:start], data[start : start + length], data[start + length :]
    match chance.randrange(9):
        case 0:
            return before
        case 1:
            return before + bytes(byte ^ 1 << chance.randrange(8) for byte in some) + after
        case 2:
            return before + after
        case 3:
            return before + chance.randbytes(length) + after
        case 4:
            return before + chance.choice(STRAY) + some + after
        case 5:
            return before + some * chance.choice((2, 1000)) + after
        case 6:
            return chance.choice(FIRST) + data
        case 7:
            return data.decode("latin-1").encode(chance.choice(("utf-16", "utf-32")))
        case _:
            return chance.choice(WHOLE)


def mutated_tensors(data: bytes, chance: Random) -> bytes:
    """Return a safetensors file with its header changed as JSON, or with the bytes of one tensor overwritten."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length].decode(), data[8 + length :]
    if chance.random() < 0.5:
        text = mutated(header, chance).encode(errors="surrogatepass")
        size = len(text) if chance.random() < 0.9 else chance.choice((0, 1, 2**31, 2**63, 2**64 - 1))
        return size.to_bytes(8, "little") + text + body
    found = json.loads(header)
    first, last = found[chance.choice([name for name in found if name != "__metadata__"])]["data_offsets"]
    filling = chance.choice(FILLINGS)
    size = last - first
    new = chance.randbytes(size) if filling is None else (filling * size)[:size]
    if chance.random() < 0.3:  # one number alone
        at = chance.randrange(max(1, size // 4)) * 4
        new = body[first : first + at] + new[at : at + 4] + body[first + at + 4 : last]
    return data[: 8 + length] + body[:first] + new + body[last:]


def _at(value: Any, place: Place) -> Any:
    for step in place:
        value = value[step]
    return value


def _change(parent: Any, step: Any, root: Any, chance: Random, raw: tuple[str, ...], fragments: dict[str, str]) -> None:
    """Change one value in place; what JSON cannot say becomes a mark, and `fragments` tells what it stands for."""

    def marked(fragment: str) -> str:
        mark = f"\u0001{len(fragments)}"
        fragments[mark] = fragment
        return mark

    old = deepcopy(parent[step])
    match chance.randrange(12):
        case 0 | 1 | 2:
            parent[step] = deepcopy(chance.choice(ODD))
        case 3:
            parent[step] = marked(chance.choice(raw))
        case 4 | 5 | 6 | 7:
            parent[step] = _near(old, chance)
        case 8:
            parent[step] = deepcopy(_at(root, _place(root, ("",), chance)))  # another value of the same file
        case 9:
            del parent[step]
        case 10 if isinstance(parent, dict) and step:  # the same key twice
            parent[marked(json.dumps(step))] = deepcopy(chance.choice(ODD))
        case _ if isinstance(parent, dict) and step:
            parent[chance.choice((f"{step}x", str(step)[:-1], *NAMES))] = parent.pop(step)
        case _:
            parent[step] = [old, old]


def _near(value: Any, chance: Random) -> Any:
    """Return a value a little beside another one, or the same in another type."""
    match value:
        case bool() | None:
            some = (not value, int(bool(value)), str(value), "", [], {})
        case int() | float() if abs(value) < 2**64:
            some = (value + 1, value - 1, -value, value * 2, value * 1000, value / 2, float(value), str(value), [value])
        case str():
            some = (value + "x", value[:-1], value.upper(), value * 2, f" {value}", [value], {value: value})
        case list():
            some = (value[:-1], value[::-1], value[:1], value + value, value * 100, [value], dict(enumerate(value)))
        case dict():
            items = list(value.items())
            some = (dict(items[:1]), dict(items[::-1]), items, list(value), [value], {"x": value}, str(value))
        case _:
            some = (0, str(value))
    return chance.choice(some)

"""Where a report goes: its three files replace nothing but an earlier report, as `lillama report` wrote it."""

import hashlib
import json
import os
from pathlib import Path

from lillama.errors import OutputError
from lillama.files.artefacts import SEAL
from lillama.files.atomic import atomic_file, digest, read_small
from lillama.runs.run_dir import is_run

SUFFIXES = (".html", ".md", ".json")
MARK = "<!-- lillama report, sha256 {} -->\n"


def places(out: Path) -> tuple[Path, Path, Path]:
    """Return the places of the page, of Markdown and of JSON, of which the first one is `out`.

    Raises:
        OutputError: `out` has no name.
    """
    if out.name in ("", ".."):
        raise OutputError(f"{out}: --out is a file to make; give it a name")
    stem = out.name.removesuffix(SUFFIXES[0])
    html, markdown, value = (out.with_name(stem + suffix) for suffix in SUFFIXES)
    return html, markdown, value


def add_seal(text: str, suffix: str) -> bytes:
    """Return a text as it is written: UTF-8, with a digest of itself by which it is known again."""
    content = text.encode(errors="replace")  # halves of characters are none
    if suffix == ".json":
        value = json.loads(content)
        return f"{json.dumps(value | {SEAL: digest(value)}, indent=2, ensure_ascii=False)}\n".encode()
    return content + _mark(content)


def write_all(texts: dict[Path, str]) -> None:
    """Write the files of a report, each of them atomically, if none of them replaces what is not of lillama.

    Raises:
        OutputError: of one of the places, which stay as they are.
    """
    for place in texts:
        refuse_taken(place)
    for place, text in texts.items():
        content = add_seal(text, place.suffix)
        with atomic_file(place) as temporary:
            temporary.write_bytes(content)


def refuse_taken(place: Path) -> None:
    """Refuse a place where a file of a report would replace something else, or pass for an artefact of a run.

    Raises:
        OutputError: what stands there.
    """
    if not place.parent.is_dir():
        raise OutputError(f"{place.parent}: no such folder; make it, or choose another --out")
    if not os.access(place.parent, os.W_OK):
        raise OutputError(f"{place.parent}: nothing may be written there; choose another --out")
    run = next((folder for folder in place.absolute().parents if is_run(folder)), None)
    if run is not None and not (run == place.parent.absolute() and place.name.startswith("report")):
        raise OutputError(
            f"{place}: lies in the run folder {run}, where a report is called report.html; choose another --out"
        )
    if os.path.lexists(place) and not _is_ours(place):
        raise OutputError(
            f"{place}: was not written by `lillama report`, or changed since; move it, or choose another --out"
        )


def _is_ours(file: Path) -> bool:
    """Tell whether a file is what `sealed` made."""
    if file.is_symlink() or not file.is_file():
        return False
    try:
        content = read_small(file)
        if file.suffix != ".json":
            size = len(_mark(b""))
            return content[-size:] == _mark(content[:-size])
        value = json.loads(content)
        return value.pop(SEAL) == digest(value) and "models" in value
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _mark(content: bytes) -> bytes:
    return MARK.format(hashlib.sha256(content).hexdigest()).encode()

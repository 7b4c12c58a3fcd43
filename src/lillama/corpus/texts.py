"""A plain text as a whole, as evaluation and stimuli want it."""

from pathlib import Path

from lillama.corpus.sources import PLAIN, check_kind, open_text, whole
from lillama.errors import DataError


def read_text(path: str | Path) -> str:
    """Return the whole of a plain text (.txt, .md, also .gz), as evaluation wants it."""
    path = Path(path)
    check_kind(path, PLAIN)
    with open_text(path) as file:
        text = whole(file, path, "give a part of it")
    if not text.strip():
        raise DataError(f"{path}: holds no text; give another file")
    return text

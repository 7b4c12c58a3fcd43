"""What the original's README says of licence and languages; nothing in it can end a run, nor delay it."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lillama.errors import ModelError
from lillama.files.publishing import plain
from lillama.files.yaml_text import load_yaml
from lillama.hub.companions import is_inside

logger = logging.getLogger(__name__)

BEGINNING = 1 << 22  # characters of a README that are read; some hold the scores of a hundred tasks at their beginning
FRONT = re.compile(r"\A\ufeff?\s*---[ \t]*\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
KEYS = ("license", "language")
MOST = 200  # languages


@dataclass(frozen=True)
class Rights:
    """Licence of the original as the hub names it, or None when unknown; its languages."""

    license: str | None = None
    languages: tuple[str, ...] = ()


def rights_of(folder: Path) -> Rights:
    """Read licence and languages from the front matter of a model's README; what cannot be read is unknown, and said so."""
    file = folder / "README.md"
    if not file.is_file() or not is_inside(file, folder):
        return Rights()
    try:
        with file.open(encoding="utf-8") as readme:
            front = FRONT.match(readme.read(BEGINNING))
        values = [load_yaml(part, file.name, ModelError) for part in _entries(front[1] if front else "")]
    except (ModelError, OSError, UnicodeDecodeError) as error:
        logger.warning("%s: its metadata cannot be read (%s); the new card names no licence", file, plain(error))
        return Rights()
    found = {key: value for one in values if isinstance(one, Mapping) for key, value in one.items() if key in KEYS}
    return Rights(_word(found.get("license")), _languages(found.get("language")))


def _entries(front: str) -> list[str]:
    """Return the lines of the keys that are wanted: the others may be long, and as wrong as they like."""
    return [
        part for part in re.split(r"^(?=[^\s#-])", front, flags=re.MULTILINE) if re.match(r"['\"]?(licen|lang)", part)
    ]


def _word(value: object) -> str | None:
    """Return a word, or a list of words as one; what is no text (a date, a number, a mapping) is unknown."""
    words = value if isinstance(value, list) else [value]
    return ", ".join(plain(word) for word in words[:MOST] if isinstance(word, str) and word.strip()) or None


def _languages(value: object) -> tuple[str, ...]:
    words = value if isinstance(value, list) else [value]
    texts = ["no" if word is False else word for word in words[:MOST]]  # Norwegian, as YAML 1.1 reads it
    return tuple(plain(word) for word in texts if isinstance(word, str) and word.strip())

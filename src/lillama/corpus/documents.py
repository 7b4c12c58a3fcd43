"""Sources to documents: plain text in pieces, records' text fields, chat turns through the tokenizer's template."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lillama.corpus.chat import ChatTemplate, chat_template
from lillama.corpus.saved import is_saved
from lillama.corpus.sources import (
    PLAIN,
    ROWS,
    DataRow,
    Source,
    check_exists,
    check_kind,
    choose_field,
    data_files,
    hub_rows,
    open_text,
    saved_rows,
)
from lillama.errors import DataError
from lillama.model.tokenizer import refuse_halves

PIECE = 1 << 16  # characters of a plain text that are handed on at once


@dataclass(frozen=True)
class Document:
    """A text, or a piece of one.

    Attributes:
        text: what it says.
        ends: False if the next `Document` goes on with the same text.
    """

    text: str
    ends: bool = True


def documents(source: Source, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """Stream the documents of a source; chat turns are written with the tokenizer's chat template."""
    if not source.weight > 0:
        raise DataError(f"{source.path}: weight is {source.weight}; it must be above 0")
    holds_text = False
    for document in _read(source, tokenizer):
        holds_text = holds_text or (not document.text.isspace() and bool(document.text))
        yield document
    if not holds_text:
        raise DataError(f"{source.path}: holds no text; give another source or `field`")


def _read(source: Source, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """Send a source to its reader by what stands at its path."""
    path = Path(source.path)
    match check_exists(source):
        case "folder" if is_saved(path):
            yield from _said(saved_rows(path, source), source, tokenizer)
        case "folder":
            for file in data_files(path, source):
                yield from _file(file, source, tokenizer)
        case "file":
            yield from _file(path, source, tokenizer)
        case "nothing":
            yield from _said(hub_rows(source), source, tokenizer)


def _file(path: Path, source: Source, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """Stream one file's documents."""
    kind = check_kind(path, (*PLAIN, *ROWS))
    if kind in PLAIN:
        yield from _pieces(path)
    else:
        yield from _said(ROWS[kind](path, source), source, tokenizer)


def _pieces(path: Path) -> Iterator[Document]:
    """Stream a plain text in pieces of about `PIECE` characters, cut after a blank line if one comes in time."""
    lines, size = [], 0
    with open_text(path) as file:
        for line in iter(lambda: file.readline(PIECE), ""):
            lines.append(line)
            size += len(line)
            if size >= 8 * PIECE or (size >= PIECE and line.isspace()):
                yield Document("".join(lines), ends=False)
                lines, size = [], 0
    yield Document("".join(lines))


def _said(
    rows: Iterable[tuple[str, DataRow]], source: Source, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Document]:
    """Turn records into documents; records whose text is null or empty say nothing and are left out."""
    template: ChatTemplate | None = None
    for where, row in rows:
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: is {type(row).__name__}; every record must be an object with fields")
        field = choose_field(row, source, where)
        place = f"{where}, field {field!r}"
        match row[field]:
            case None | "" | []:
                continue
            case str(text):
                refuse_halves(text, place)
            case [*turns] if any(isinstance(turn, Mapping) for turn in turns):
                template = template or chat_template(tokenizer, place)
                text = template.write(turns, place)
                refuse_halves(text, place)
            case value:
                kind = type(value).__name__
                raise DataError(f"{where}: field {field!r} is {kind}; it must be text or a list of chat turns")
        yield Document(text)

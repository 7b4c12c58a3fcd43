"""Where calibration text lies: files, folders, saved datasets, the hub; read record by record, never unpickled."""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import Field

from lillama.corpus.paths import Standing, files_below, refuse_no_file, standing
from lillama.corpus.saved import is_saved, refuse_outside
from lillama.errors import DataError, first_line, printable, suggestion
from lillama.files.atomic import digest, file_digest

FIELDS = ("text", "content", "messages", "conversations", "conversation")  # looked for in this order
SPLITS = {"train", "validation", "valid", "val", "dev", "test", "eval"}
PLAIN = (".txt", ".md")
SPEECH, IMAGES = (".wav", ".flac", ".ogg", ".mp3"), (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FEATURES = ".npy"  # log-mel features that were computed before
SHOWN = 20  # names of fields that an error tells
LINE, WHOLE = 64 << 20, 1 << 30  # characters of a record on one line, and of a text that is read at once
SMALL, PACKED = (
    1 << 28,
    100,
)  # bytes that a column of a Parquet file may unpack to whatever its ratio; the ratio above that

DataRow = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """One origin of calibration text.

    Attributes:
        path: a .txt, .md, .jsonl (each also .gz), .json or .parquet file; a folder of such files, or one saved by
            `datasets.save_to_disk`; or the id of a dataset on the Hugging Face hub. For models of speech or images a folder
            of sound or image files, in which `metadata.jsonl` may tell what is said.
        field: the field that holds text or chat turns; None looks for `text`, `content`, `messages`,
            `conversations`, `conversation`.
        config: the dataset's configuration; in a folder of files, the name of a sub-folder.
        split: the dataset's split; in a folder of files, the word in their names.
        weight: this source's share of the token budget, relative to the other sources' weights.
    """

    path: str
    field: str | None = None
    config: str | None = None
    split: str = "train"
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


def fingerprint(source: Source) -> str:
    """Return what pins a source's content: SHA-256 of the file, of a folder's file list, or the hub's commit."""
    path = Path(source.path)
    match check_exists(source):
        case "file":
            return file_digest(path)
        case "nothing":
            return _revision(source.path)
    media = media_files(path, (*SPEECH, *IMAGES, FEATURES), none=True)
    if is_saved(path):
        files = sorted(path.rglob("*.arrow"))
    else:
        files = [*media, *(() if media and not _data(path) else data_files(path, source))]
    return digest({file.relative_to(path).as_posix(): file_digest(file) for file in files})


def json_lines(path: Path, source: Source) -> Iterator[tuple[str, DataRow]]:
    """Stream the records of a file with one JSON object on each line."""
    with open_text(path) as file:
        for number, line in enumerate(lines(file, path), 1):
            if not line.isspace():
                yield f"{path}, line {number}", _parse(line, f"{path}, line {number}")


def _json(path: Path, source: Source) -> Iterator[tuple[str, DataRow]]:
    """Yield the records of a JSON array, which is read whole; a file of JSON lines under this name is streamed."""
    with open_text(path) as file:
        is_array = next((line for line in lines(file, path) if not line.isspace()), "").lstrip().startswith("[")
    if not is_array:
        yield from json_lines(path, source)
        return
    with open_text(path) as file:
        rows = _parse(whole(file, path, "write one object on each line (.jsonl)"), str(path), list)
    for number, row in enumerate(rows, 1):
        yield f"{path}, record {number}", row


def _parquet(path: Path, source: Source) -> Iterator[tuple[str, DataRow]]:
    """Stream the records of a Parquet file, reading the one column that is needed."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            column = choose_field(file.schema_arrow.names, source, str(path))
            _refuse_bomb(path, file.metadata, column)
            batches = file.iter_batches(batch_size=64, columns=[column])
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield f"{path}, record {number}", row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # values of no Python type among them
        raise DataError(f"{path}: is no readable Parquet file ({first_line(error)}); write it anew") from error


def _refuse_bomb(path: Path, metadata: Any, column: str) -> None:
    """Refuse a column that unpacks to far more than text does: its pages would fill the memory."""
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            packed, unpacked = chunk.total_compressed_size, chunk.total_uncompressed_size
            if chunk.path_in_schema.partition(".")[0] == column and unpacked > max(SMALL, PACKED * packed):
                raise DataError(
                    f"{path}: column {printable(column)} unpacks {packed:,} bytes to {unpacked:,}, which no text does; "
                    "get a sound copy"
                )


ROWS: dict[str, Callable[[Path, Source], Iterator[tuple[str, DataRow]]]] = {
    ".jsonl": json_lines,
    ".json": _json,
    ".parquet": _parquet,
}


def saved_rows(path: Path, source: Source) -> Iterator[tuple[str, DataRow]]:
    """Stream the records of a folder saved by `datasets.save_to_disk`, from its memory-mapped files."""
    from datasets import DatasetDict, load_from_disk

    refuse_outside(path)
    try:
        dataset = load_from_disk(str(path))
    except Exception as error:  # of parsers that share no base class
        raise DataError(f"{path}: cannot be loaded ({first_line(error)}); save the dataset anew") from error
    if isinstance(dataset, DatasetDict):
        if source.split not in dataset:
            hint = suggestion(source.split, map(str, dataset))
            raise DataError(f"{path}: no split {source.split!r}; it has {', '.join(map(str, dataset))}{hint}")
        dataset = dataset[source.split]
    column = choose_field(dataset.column_names, source, str(path))
    try:
        for number, row in enumerate(dataset.with_format(None).select_columns([column]), 1):
            yield f"{path}, record {number}", cast(DataRow, row)
    except Exception as error:  # of decoders that share no base class
        raise DataError(f"{path}: cannot be read ({first_line(error)}); save the dataset anew") from error


def hub_rows(source: Source) -> Iterator[tuple[str, DataRow]]:
    """Stream the records of a dataset on the hub, at the commit that `fingerprint` tells."""
    from datasets import load_dataset

    revision = _revision(source.path)
    try:
        rows = load_dataset(source.path, source.config, split=source.split, streaming=True, revision=revision)
        for number, row in enumerate(rows, 1):
            yield f"{source.path}, record {number}", cast(DataRow, row)
    except Exception as error:  # parsers and HTTP libraries below `datasets` share no base class
        raise DataError(
            f"{source.path}: config {source.config!r}, split {source.split!r} cannot be read from the hub "
            f"({first_line(error)}); check both, or download the dataset and give its folder"
        ) from error


@cache
def _revision(name: str) -> str:
    """Ask the hub for a dataset's newest commit; asked once, so that reading and manifest agree."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name).sha or "unknown"
    except Exception as error:  # HTTP errors of the hub's transport library share no base class over its versions
        raise DataError(
            f"{name}: no such file or folder here, and not found as a dataset on the Hugging Face hub "
            f"({first_line(error)}); check the path, or the network"
        ) from error


def data_files(folder: Path, source: Source) -> list[Path]:
    """List a folder's data files of the wanted split: those that name it, or for `train` those that name none."""
    root = folder / (source.config or "")
    files = [path for path in _data(root) if path.stem.lower() != "readme" and not path.name.startswith(".")]
    words = {path: set(re.split(r"[^a-z]+", path.relative_to(root).as_posix().lower())) for path in files}
    chosen = [path for path in files if source.split in words[path]]
    if not chosen and source.split == "train":
        chosen = [path for path in files if not words[path] & SPLITS]
    if not chosen:
        raise DataError(
            f"{root}: no {', '.join((*PLAIN, *ROWS))} file of split {source.split!r} among {len(files)} data files; "
            "check `split` and `config`"
        )
    for path in chosen:
        refuse_no_file(path)
    return chosen


def _data(folder: Path) -> list[Path]:
    """List the files of a folder that hold text."""
    return [path for path in files_below(folder) if _kind(path) in (*PLAIN, *ROWS)]


def media_files(folder: Path, kinds: Sequence[str], none: bool = False) -> list[Path]:
    """List the files of a folder, or the one file, of some kinds.

    Raises:
        DataError: there is none, unless `none` allows that.
    """
    inside = files_below(folder) if standing(folder) == "folder" else [folder]
    files = [path for path in inside if path.suffix.lower() in kinds]
    for path in files:
        refuse_no_file(path)
    if not files and not none:
        raise DataError(
            f"{folder}: no file of type {', '.join(kinds)}, which this model takes; give a folder of such files"
        )
    return files


def choose_field(names: Iterable[str], source: Source, where: str) -> str:
    """Choose the field to read among those of a record."""
    names = list(names)
    if source.field in names:
        return source.field
    found = [name for name in FIELDS if name in names]
    if source.field is None and found:
        return found[0]
    wanted = "no text or chat field" if source.field is None else f"no field {source.field!r}"
    hints = [suggestion(word, names) for word in ([source.field] if source.field else FIELDS)]
    hint = next(filter(None, hints), "; name one with `field`")
    raise DataError(f"{where}: {wanted}; it has {', '.join(names[:SHOWN]) or 'no fields'}{hint}")


def check_kind(path: Path, kinds: Iterable[str]) -> str:
    """Return the kind (suffix without .gz) of a file that must exist and be of one of the kinds."""
    refuse_no_file(path)
    kind = _kind(path)
    if kind not in kinds:
        raise DataError(
            f"{path}: unknown file type {path.suffix or '(no suffix)'!r}; "
            f"it must be one of {', '.join(kinds)} (text and .jsonl also .gz){suggestion(kind, kinds)}"
        )
    return kind


@contextmanager
def open_text(path: Path) -> Iterator[TextIOWrapper]:
    """Open a UTF-8 text, packed with gzip or not, and turn what can go wrong while reading into one clear line."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with cast(TextIOWrapper, opener(path, "rt", encoding="utf-8-sig")) as file:
            yield file
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{path}: is not UTF-8 text (byte 0x{byte:02x}); convert it to UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); check the file") from error


def lines(file: TextIOWrapper, path: Path) -> Iterator[str]:
    """Yield the lines of an opened text; of a few bytes gzip makes a line that fills all memory.

    Raises:
        DataError: a line is longer than 64 Mi characters.
    """
    for number, line in enumerate(iter(lambda: file.readline(LINE + 1), ""), 1):
        if len(line) > LINE:
            raise DataError(f"{path}, line {number}: longer than {LINE >> 20} Mi characters; cut it, or leave it out")
        yield line


def whole(file: TextIOWrapper, path: Path, remedy: str) -> str:
    """Return all of an opened text.

    Raises:
        DataError: it is longer than 1 Gi characters.
    """
    text = file.read(WHOLE + 1)
    if len(text) > WHOLE:
        raise DataError(f"{path}: longer than {WHOLE >> 30} Gi characters, and it is read as a whole; {remedy}")
    return text


def _parse(text: str, where: str, kind: type = dict) -> Any:
    """Parse JSON that must hold an object (or the kind given)."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter where it is nested without end
        raise DataError(f"{where}: is not JSON ({first_line(error)}); .jsonl wants one object on each line") from error
    if not isinstance(value, kind):
        raise DataError(f"{where}: is JSON {type(value).__name__}; it must be an object with fields")
    return value


def _kind(path: Path) -> str:
    """Return a file's suffix, looking through .gz where it is allowed."""
    name = path.name.lower()
    inner = Path(name.removesuffix(".gz")).suffix
    return inner if inner in (*PLAIN, ".jsonl") else Path(name).suffix


def check_exists(source: Source) -> Standing:
    """Return what stands at a source's path; where there is nothing, it has the form of a hub id.

    Raises:
        DataError: it is neither here nor has that form, or what stands there cannot be read.
    """
    if not source.path:
        raise DataError("a calibration source has an empty path; name a file, a folder or a dataset")
    found = standing(Path(source.path))
    if found == "nothing" and not is_hub_id(source.path):
        raise DataError(f"{source.path}: no such file; check the path")
    return found


def is_hub_id(path: str) -> bool:
    """Tell whether the text can be a dataset id (`name` or `owner/name`) and does not look like a file."""
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path)) and _kind(Path(path)) not in (*PLAIN, *ROWS)

"""Documents to token sequences of one length: packed without padding, within a budget, chosen by a seed."""

import hashlib
import logging
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import TypedDict

from lillama.corpus.documents import Document, documents
from lillama.corpus.sources import Source, fingerprint
from lillama.errors import DataError
from lillama.files.artefacts import TENSORS, Count, load_tensors, load_whole, save_json, save_tensors, seal_of
from lillama.files.atomic import atomic_folder, digest
from lillama.model.tokenizer import encode_text, refuse_unknown, tokenizer_hash
from lillama.system.progress import Progress, Report, silent

VERSION = 1
SURPLUS = 4  # windows collected for each window wanted, so that the seed has something to choose from
FILE, MANIFEST = "tokens.safetensors", "manifest.json"
INPUT = "input."  # before the name of what else the model takes, in the file
BATCH = 16  # documents (or pieces of one) tokenised at once

log = logging.getLogger(__name__)


SourceKind = Literal["text", "self", "speech", "images"]


class SourceJson(TypedDict):
    """A source in `calibration/manifest.json`."""

    path: str
    field: str | None
    config: str | None
    split: str
    weight: float
    content: str
    documents: int
    tokens: int


class ManifestJson(TypedDict):
    """`calibration/manifest.json`."""

    version: int
    kind: SourceKind
    sources: list[SourceJson]
    tokenizer: str
    seq_len: Count
    wanted: Count
    tokens: Count
    seed: int
    temperature: float | None
    sha256: str


@dataclass(frozen=True)
class SourceRecord:
    """What was taken from one source.

    Attributes:
        path: as the user gave it.
        field: as the user gave it; None if it was found by itself.
        config: the dataset's configuration.
        split: the dataset's split.
        weight: as the user gave it.
        content: SHA-256 of the file or of a folder's files, or the commit on the hub.
        documents: documents read.
        tokens: tokens taken.
    """

    path: str
    field: str | None
    config: str | None
    split: str
    weight: float
    content: str
    documents: int
    tokens: int

    def to_json(self) -> SourceJson:
        """Return the JSON value that is written to disk."""
        return {
            "path": self.path,
            "field": self.field,
            "config": self.config,
            "split": self.split,
            "weight": self.weight,
            "content": self.content,
            "documents": self.documents,
            "tokens": self.tokens,
        }


@dataclass(frozen=True)
class Manifest:
    """Where token sequences come from, enough to make them again.

    Attributes:
        kind: `"text"` from sources, `"self"` written by the model; `"speech"` and `"images"` from files.
        sources: one record for each source; none for `"self"`.
        tokenizer: hash of the tokenizer; empty for a model without one.
        seq_len: tokens of a sequence.
        wanted: tokens asked for.
        tokens: real tokens there are.
        seed: of the choice and the order, or of the sampling.
        temperature: of the sampling; None for `"text"`.
        sha256: of the ids, as little-endian int64.
    """

    kind: SourceKind
    sources: tuple[SourceRecord, ...]
    tokenizer: str
    seq_len: int
    wanted: int
    tokens: int
    seed: int
    temperature: float | None
    sha256: str

    def to_json(self) -> ManifestJson:
        """Return the JSON value that is written to disk."""
        return {
            "version": VERSION,
            "kind": self.kind,
            "sources": [record.to_json() for record in self.sources],
            "tokenizer": self.tokenizer,
            "seq_len": self.seq_len,
            "wanted": self.wanted,
            "tokens": self.tokens,
            "seed": self.seed,
            "temperature": self.temperature,
            "sha256": self.sha256,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Manifest":
        """Return the manifest that `to_json` wrote."""
        fields: dict[str, Any] = {name: item for name, item in value.items() if name not in ("version", TENSORS)}
        fields["sources"] = tuple(SourceRecord(**record) for record in value["sources"])
        return cls(**fields)

    @property
    def hash(self) -> str:
        """SHA-256 of the JSON value: the identity of the calibration set."""
        return digest(self.to_json())


@dataclass(frozen=True)
class CalibrationSet:
    """Token sequences of one length.

    Attributes:
        ids: the tokens.
        mask: True for a real token; None when nothing is padded.
        manifest: where they come from.
        inputs: what else the model's forward takes, a row for each sequence: features of speech, for example.
    """

    ids: Int[Tensor, "sequences length"]
    mask: Bool[Tensor, "sequences length"] | None
    manifest: Manifest
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return self.ids.numel() if self.mask is None else int(self.mask.sum())

    @property
    def seal(self) -> str:
        """SHA-256 of all tensors, as their file names it."""
        return seal_of(FILE, self._tensors)

    def save(self, folder: Path) -> None:
        """Write `tokens.safetensors` and `manifest.json` as a folder that appears at once."""
        with atomic_folder(folder) as temporary:
            seal = save_tensors(temporary / FILE, self._tensors)
            save_json(temporary / MANIFEST, self.manifest.to_json(), {FILE: seal})

    @classmethod
    def load(cls, folder: Path) -> "CalibrationSet":
        """Read what `save` wrote.

        Raises:
            DamagedError: a file is missing, or is not what was written.
            DataError: another version of lillama wrote it.
        """
        value = load_whole(folder / MANIFEST)
        if value["version"] != VERSION:
            raise DataError(f"{folder}: has version {value['version']}, this lillama reads {VERSION}; gather it anew")
        tensors = load_tensors(folder / FILE)
        inputs = {name.removeprefix(INPUT): tensor for name, tensor in tensors.items() if name.startswith(INPUT)}
        return cls(tensors["ids"], tensors.get("mask"), Manifest.from_json(value), inputs)

    @property
    def _tensors(self) -> dict[str, Tensor]:
        named = {"ids": self.ids} | ({} if self.mask is None else {"mask": self.mask})
        return named | {INPUT + name: tensor for name, tensor in self.inputs.items()}


def pack(
    sources: tuple[Source, ...],
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    seq_len: int,
    seed: int,
    report: Report = silent,
    embeddings: int | None = None,
) -> CalibrationSet:
    """Read the sources and choose sequences by the seed, each source giving its share of the token budget.

    Each sequence is `seq_len` successive tokens of one source's stream; documents are joined by the end-of-text token. A token
    beyond the model's `embeddings` is refused; None knows no bound.
    """
    generator = torch.Generator().manual_seed(seed)
    shares = share(sources, tokens // seq_len)
    parts, records = [], []
    for done, (source, wanted) in enumerate(zip(sources, shares, strict=True)):
        report(Progress("calibration", done, len(sources), source.path, sum(part.numel() for part in parts)))
        stream = _Stream(source, tokenizer, embeddings)
        windows = _windows(stream, seq_len, SURPLUS * wanted)
        if len(windows) < wanted:
            _check_enough(source, len(windows) * seq_len, wanted * seq_len, seq_len)
        part = windows[torch.randperm(len(windows), generator=generator)[:wanted]].long()
        parts.append(part)
        records.append(
            SourceRecord(
                **{name: getattr(source, name) for name in ("path", "field", "config", "split", "weight")},
                content=fingerprint(source),
                documents=stream.documents,
                tokens=part.numel(),
            )
        )
    ids = torch.cat(parts)
    ids = ids[torch.randperm(len(ids), generator=generator)]
    report(Progress("calibration", len(sources), len(sources), tokens=ids.numel()))
    return build_set("text", tuple(records), tokenizer, ids, tokens, seed)


def build_set(
    kind: Literal["text", "self"],
    records: tuple[SourceRecord, ...],
    tokenizer: PreTrainedTokenizerBase,
    ids: Int[Tensor, "sequences length"],
    wanted: int,
    seed: int,
    temperature: float | None = None,
) -> CalibrationSet:
    """Put unpadded sequences together with their manifest."""
    manifest = Manifest(
        kind=kind,
        sources=records,
        tokenizer=tokenizer_hash(tokenizer),
        seq_len=ids.shape[1],
        wanted=wanted,
        tokens=ids.numel(),
        seed=seed,
        temperature=temperature,
        sha256=ids_hash(ids),
    )
    return CalibrationSet(ids, None, manifest)


def share(sources: tuple[Source, ...], sequences: int) -> list[int]:
    """Share sequences among sources by weight, by the method of largest remainders; each must get one at least."""
    whole = sum(source.weight for source in sources)
    exact = [sequences * source.weight / whole for source in sources]
    counts = [int(value) for value in exact]
    remainders = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in remainders[: sequences - sum(counts)]:
        counts[i] += 1
    for source, count in zip(sources, counts, strict=True):
        if not count:
            raise DataError(
                f"{source.path}: its weight {source.weight} of {whole} gives it none of the {sequences} sequences; "
                "raise the weight or the token budget, or leave the source out"
            )
    return counts


def ids_hash(ids: Int[Tensor, "sequences length"]) -> str:
    """Return the SHA-256 of token ids as little-endian int64."""
    return hashlib.sha256(ids.cpu().numpy().astype("<i8").tobytes()).hexdigest()


class _Stream:
    """A source's tokens in order, with the end-of-text token between documents; counts the documents it has begun."""

    def __init__(self, source: Source, tokenizer: PreTrainedTokenizerBase, embeddings: int | None) -> None:
        self.source, self.tokenizer, self.embeddings, self.documents = source, tokenizer, embeddings, 0

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the ids of one document, or of one piece, at a time."""
        end = self.tokenizer.eos_token_id
        separator = [] if end is None else [cast(int, end)]
        refuse_unknown(self.tokenizer, separator, self.embeddings, "tokenizer's end-of-text token")
        last, inside = separator, False
        for document, ids in self._tokenised():
            if not inside:
                self.documents += 1
                if last[-1:] != separator:  # a chat template may have written it
                    yield separator
            if ids:
                yield ids
                last = ids
            inside = not document.ends

    def _tokenised(self) -> Iterator[tuple[Document, list[int]]]:
        """Tokenise documents in batches, which fast tokenizers do in parallel."""
        stream = documents(self.source, self.tokenizer)
        while batch := list(islice(stream, BATCH)):
            texts = [document.text for document in batch]
            found = encode_text(self.tokenizer, texts, self.embeddings, self.source.path, add_special_tokens=False)
            yield from zip(batch, found["input_ids"], strict=True)


def _windows(stream: _Stream, seq_len: int, limit: int) -> Int[Tensor, "sequences length"]:
    """Cut a stream's beginning into at most `limit` windows; the rest that fills no window is dropped."""
    buffer = array("i")
    for ids in stream:
        buffer.extend(ids)
        if len(buffer) >= limit * seq_len:
            break
    count = min(len(buffer) // seq_len, limit)
    return torch.tensor(buffer[: count * seq_len], dtype=torch.int32).view(count, seq_len)


def _check_enough(source: Source, found: int, wanted: int, seq_len: int) -> None:
    """Warn of a source that is shorter than its share, refuse one that fills no sequence."""
    if not found:
        raise DataError(f"{source.path}: holds less than one sequence of {seq_len} tokens; give more text")
    log.warning("%s: holds %d tokens of the %d wanted; all are taken", source.path, found, wanted)

"""Calibration in one call: sources, or the model itself, to token sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lillama.calibration.generate import generate
from lillama.calibration.media import pack_media
from lillama.calibration.pack import CalibrationSet, build_set, pack
from lillama.corpus.sources import Source
from lillama.errors import DataError
from lillama.model.kind import kind_of
from lillama.model.tokenizer import embeddings_of
from lillama.system.progress import Report, silent

SELF = "self"


@dataclass(frozen=True)
class CalibrationConfig:
    """What the model is calibrated on.

    Attributes:
        sources: where the text comes from; empty: the model writes it itself.
        tokens: token budget, shared among the sources by weight.
        seq_len: tokens of a sequence.
        temperature: of the sampling when the model writes the text; 1 is the model's own distribution.
    """

    sources: tuple[Source, ...] = ()
    tokens: int = 131072
    seq_len: int = 256
    temperature: float = 1.0


def sample_calibration(
    config: CalibrationConfig,
    model_path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    seed: int,
    device: torch.device | str = "cpu",
    report: Report = silent,
    model: PreTrainedModel | None = None,
) -> CalibrationSet:
    """Return the calibration sequences that a configuration describes; the same seed gives the same sequences.

    Args:
        config: where they come from.
        model_path: folder of the model.
        tokenizer: of the model; None for one that neither reads nor writes text.
        seed: of every random choice.
        device: on which a model writes its own text.
        report: told about progress.
        model: its skeleton, which tells what it takes; None means token ids. An utterance or an image takes the place of
            `seq_len` tokens.
    """
    _check(config)
    if model is not None and not (kind := kind_of(model)).takes_tokens:
        rows, known = config.tokens // config.seq_len, embeddings_of(model)
        return pack_media(config.sources, kind, Path(model_path), tokenizer, rows, seed, report, known)
    assert tokenizer is not None
    if config.sources:
        embeddings = None if model is None else embeddings_of(model)
        return pack(config.sources, tokenizer, config.tokens, config.seq_len, seed, report, embeddings)
    ids = generate(model_path, tokenizer, config.tokens, config.seq_len, seed, device, config.temperature, report)
    return build_set("self", (), tokenizer, ids, config.tokens, seed, config.temperature)


def parse_sources(words: Sequence[str]) -> tuple[Source, ...]:
    """Turn the command line's paths and dataset ids into sources; `self` alone, or nothing, means the model itself."""
    if SELF in words and len(words) > 1:
        raise DataError(f"{SELF!r} stands beside {len(words) - 1} other sources; give it alone or leave it out")
    return tuple(Source(word) for word in words if word != SELF)


def _check(config: CalibrationConfig) -> None:
    """Refuse numbers that make no sense together."""
    if config.seq_len <= 0:
        raise DataError(f"seq_len is {config.seq_len}; it must be positive")
    if config.tokens <= 0:
        raise DataError(f"tokens is {config.tokens}; it must be positive")
    if config.tokens < config.seq_len:
        raise DataError(f"tokens is {config.tokens}, less than one sequence of seq_len {config.seq_len}; raise it")
    if not config.temperature > 0:
        raise DataError(f"temperature is {config.temperature}; it must be above 0")
    for source in config.sources:
        if not source.weight > 0:
            raise DataError(f"{source.path}: weight is {source.weight}; it must be above 0")

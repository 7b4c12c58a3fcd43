"""A whole model in memory, loaded by transformers: what a stage needs that cannot work block by block."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging as reports

from lillama.model.checkpoint import CheckpointReader
from lillama.model.foreign import explained
from lillama.model.remote import runs_code
from lillama.model.skeleton import skeleton
from lillama.model.source import load_config, quantization
from lillama.model.weights import Weights, missing, warn_of_unused
from lillama.resources import shortage_explained


def load(kind: Any, folder: Path, device: torch.device | str | None = None, **options: Any) -> PreTrainedModel:
    """Load a model as `kind.from_pretrained(folder, **options)` does, from safetensors files that lie in the folder.

    Args:
        kind: a class of transformers, or an Auto class.
        folder: of the model.
        device: that it is moved to; None leaves it where the options put it.
        options: `dtype`, `device_map` and the like.

    Raises:
        ModelError: the weights cannot be read, or not all are there, or transformers cannot load the model.
        ResourceError: memory does not suffice.
    """
    reader, config = CheckpointReader(folder), load_config(folder)
    _ = reader.entries  # refuses pickles, indexes that lead elsewhere and damaged files
    empty = skeleton(config) if config.architectures else None  # and sizes that no model has, before memory is taken
    checked = empty is not None and quantization(config) is None
    if empty is not None and checked:
        Weights.of(empty, reader)
    model: Any
    with explained(f"{folder}: transformers cannot load this model"), shortage_explained(), _own_words():
        model, found = kind.from_pretrained(
            folder, use_safetensors=True, trust_remote_code=runs_code(), output_loading_info=True, **options
        )
        model = model.eval() if device is None else model.to(device).eval()
    if found["missing_keys"]:
        raise missing(reader, min(found["missing_keys"]))
    if not checked:
        warn_of_unused(folder, found["unexpected_keys"])
    return model


def weight_bytes(folder: Path, dtype: torch.dtype | None) -> int:
    """Return the bytes that a model's weights take in memory.

    Args:
        folder: of the model.
        dtype: that floating-point weights are loaded in; None for the stored ones.
    """
    reader = CheckpointReader(folder)
    return sum(reader.nbytes(name, dtype) for name in reader.names)


@contextmanager
def _own_words() -> Iterator[None]:
    """Keep transformers' own report of missing and unused tensors back: we say it in one line."""
    level = reports.get_verbosity()
    reports.set_verbosity_error()
    try:
        yield
    finally:
        reports.set_verbosity(level)

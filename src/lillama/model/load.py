"""A whole model in memory, loaded by transformers: what a stage needs that cannot work block by block."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as reports

from lillama.errors import ResourceError
from lillama.model.checkpoint import CheckpointReader
from lillama.model.foreign import explain_errors
from lillama.model.remote import runs_code
from lillama.model.skeleton import skeleton
from lillama.model.source import computed_dtype, load_config, quantization
from lillama.model.weights import Weights, missing, warn_of_unused
from lillama.system.memory import MemoryBudget
from lillama.system.resources import explain_shortage, readable


def load(
    folder: Path,
    device: torch.device,
    kind: Any = AutoModelForCausalLM,
    *,
    dtype: str | None = None,
    offload: Path | None = None,
    generation: GenerationConfig | None = None,
) -> PreTrainedModel:
    """Load a model, dense or compressed, from safetensors files that lie in its folder.

    Args:
        folder: of the model.
        device: that computes.
        kind: a class of transformers, or an Auto class.
        dtype: of the weights in memory, as torch names it; `auto` for the stored one. By default fp32 on the CPU and the
            stored one elsewhere.
        offload: an empty folder; with one, weights are spread over devices, memory and disk, in their stored type.
        generation: how it writes; None for what its generation_config.json says.

    Raises:
        ModelError: the weights cannot be read, or not all are there, or transformers cannot load the model or use its
            generation_config.json.
        ResourceError: memory does not suffice.
    """
    if generation is None:
        _refuse_generation_config(folder / "generation_config.json")
    reader, config = CheckpointReader(folder), load_config(folder)
    _ = reader.entries  # refuses pickles, indexes that lead elsewhere and damaged files
    empty = skeleton(config) if config.architectures else None  # and sizes that no model has, before memory is taken
    checked = empty is not None and quantization(config) is None
    if empty is not None and checked:
        Weights.of(empty, reader)
    spread = {} if offload is None else {"device_map": "auto", "offload_folder": str(offload)}
    wanted = dtype or ("auto" if offload is not None else computed_dtype(config, device))
    model: Any
    with explain_errors(f"{folder}: transformers cannot load this model"), explain_shortage(), _own_words():
        model, found = kind.from_pretrained(
            folder,
            use_safetensors=True,
            trust_remote_code=runs_code(),
            output_loading_info=True,
            dtype=wanted,
            generation_config=generation,
            **spread,
        )
        model = model.eval() if spread else model.to(device).eval()
    if found["missing_keys"]:
        raise missing(reader, min(found["missing_keys"]))
    if not checked:
        warn_of_unused(folder, found["unexpected_keys"])
    return model


def fits(folder: Path, device: torch.device) -> bool:
    """Tell whether a model's weights, in the type that they are computed in, fit in the free memory of a device."""
    return MemoryBudget.of(device).holds_model(weight_bytes(folder, device))


def refuse_too_large(folder: Path, device: torch.device) -> None:
    """Raise `ResourceError` where a model's weights, in the type that they are computed in, do not fit in free memory."""
    size, memory = weight_bytes(folder, device), MemoryBudget.of(device)
    if not memory.holds_model(size):
        raise ResourceError(
            f"{folder}: its weights take {readable(size)} on {device}, where {readable(memory.device)} are free, and this "
            "measure needs them all at once; choose another --device"
        )


def weight_bytes(folder: Path, device: torch.device) -> int:
    """Return the bytes that a model's weights take in the memory of a device, in the type that they are computed in."""
    reader, dtype = CheckpointReader(folder), computed_dtype(load_config(folder), device)
    return sum(reader.nbytes(name, dtype) for name in reader.names)


def _refuse_generation_config(file: Path) -> None:
    """Refuse a model's settings for writing where transformers cannot read them; they count in tasks that let it write."""
    if file.is_file():
        with explain_errors(f"{file}: transformers cannot use it", "mend it, or remove it for transformers' defaults"):
            GenerationConfig.from_pretrained(file.parent)


@contextmanager
def _own_words() -> Iterator[None]:
    """Keep transformers' own report of missing and unused tensors back: we say it in one line."""
    level = reports.get_verbosity()
    reports.set_verbosity_error()
    try:
        yield
    finally:
        reports.set_verbosity(level)

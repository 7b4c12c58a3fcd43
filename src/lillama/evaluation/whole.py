"""A whole model in memory, for what cannot be done block by block."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from lillama.errors import ResourceError
from lillama.model.foreign import explained
from lillama.model.loading import load, weight_bytes
from lillama.model.source import load_config, stored_dtype
from lillama.resources import free_memory, readable

MARGIN = 0.8  # share of the free memory that weights may take


def refuse_too_large(folder: Path, device: torch.device) -> None:
    """Raise `ResourceError` where a model's weights do not fit in the device's free memory; the CPU widens them to fp32."""
    size = weight_bytes(folder, torch.float32 if device.type == "cpu" else stored_dtype(load_config(folder)))
    free = free_memory(device)
    if size > MARGIN * free:
        raise ResourceError(
            f"{folder}: its weights take {readable(size)} on {device}, where {readable(free)} are free, and this "
            "measure needs them all at once; choose another --device"
        )


def load_whole(folder: Path, device: torch.device, generation: GenerationConfig | None = None) -> PreTrainedModel:
    """Load a causal language model, dense or compressed, in fp32 on the CPU and in its stored type elsewhere.

    Args:
        folder: of the model.
        device: that computes.
        generation: how it writes; None for what its generation_config.json says.

    Raises:
        ModelError: transformers cannot load it, or use its generation_config.json.
        ResourceError: it does not fit.
    """
    refuse_too_large(folder, device)
    if generation is None:
        _refuse_generation_config(folder / "generation_config.json")
    dtype = torch.float32 if device.type == "cpu" else "auto"
    return load(AutoModelForCausalLM, folder, device, dtype=dtype, generation_config=generation)


def _refuse_generation_config(file: Path) -> None:
    """Refuse a model's settings for writing where transformers cannot read them; they count in tasks that let it write."""
    if file.is_file():
        with explained(f"{file}: transformers cannot use it", "mend it, or remove it for transformers' defaults"):
            GenerationConfig.from_pretrained(file.parent)

"""A whole model in memory, for what cannot be done block by block."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from lillama.errors import ResourceError
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


def load_whole(folder: Path, device: torch.device) -> PreTrainedModel:
    """Load a causal language model, dense or compressed, in fp32 on the CPU and in its stored type elsewhere.

    Raises:
        ModelError: transformers cannot load it.
        ResourceError: it does not fit.
    """
    refuse_too_large(folder, device)
    dtype = torch.float32 if device.type == "cpu" else "auto"
    return load(AutoModelForCausalLM, folder, device, dtype=dtype)

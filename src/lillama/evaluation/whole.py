"""A whole model in memory, for what cannot be done block by block."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedModel

from lillama.errors import ModelError, ResourceError
from lillama.model.source import load_config, stored_dtype
from lillama.resources import free_memory, readable

MARGIN = 0.8  # share of the free memory that weights may take


def refuse_too_large(folder: Path, device: torch.device) -> None:
    """Raise `ResourceError` where a model's weights do not fit in the device's free memory; the CPU widens them to fp32."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if device.type == "cpu":
        size *= 4 / stored_dtype(load_config(folder)).itemsize
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
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, StrictDataclassError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"{folder}: transformers cannot load this model: {reason}") from error
    return model.to(device).eval()

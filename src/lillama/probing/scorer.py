"""A language model in memory that can be asked how likely texts are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
)

from lillama.calibration.tokenizer import load_tokenizer
from lillama.errors import ModelError, ProbeError
from lillama.model.loading import load
from lillama.model.source import load_config, locate, stored_dtype

LOGIT_BYTES = 256 << 20
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Scorer:
    """A model, its tokenizer, and how the two are used.

    Attributes:
        name: that the user gave.
        model: that computes logits.
        tokenizer: of the model.
        masked: whether the model fills masks instead of continuing texts.
        batch_tokens: tokens that are computed at once.
        longest: tokens of a sequence at most; None where neither model nor tokenizer bounds them.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    masked: bool
    batch_tokens: int
    longest: int | None


def load_scorer(model: str | Path, device: torch.device, batch_tokens: int | None = None) -> Scorer:
    """Load a model, dense or compressed by lillama; in fp32 on the CPU and in its stored type elsewhere.

    Args:
        model: folder or hub id.
        device: that computes.
        batch_tokens: tokens that are computed at once; by default 4096, or fewer where the logits would take 256 MB.

    Raises:
        ModelError: the model cannot be loaded, or has no language-modelling head.
        ProbeError: `batch_tokens` is below 1.
    """
    if batch_tokens is not None and batch_tokens < 1:
        raise ProbeError(f"batch_tokens is {batch_tokens}; it must be at least 1")
    path = locate(model)
    config = load_config(path)
    masked = fills_masks(config)
    tokenizer = load_tokenizer(path)
    if masked and tokenizer.mask_token_id is None:
        raise ModelError(f"{model}: the tokenizer has no mask token, which pseudo-log-likelihood needs")
    text = config.get_text_config()
    bounds = [getattr(text, "max_position_embeddings", None), tokenizer.model_max_length]
    longest = min((bound for bound in bounds if bound and 0 < bound < 10**9), default=None)
    at_once = batch_tokens or min(TOKENS_AT_ONCE, max(1, LOGIT_BYTES // (4 * text.vocab_size)))
    return Scorer(str(model), _load(path, config, masked, device), tokenizer, masked, at_once, longest)


def fills_masks(config: PretrainedConfig) -> bool:
    """Return whether a model fills masks (True) or continues texts (False).

    Raises:
        ModelError: it does neither.
    """
    name = next(iter(config.architectures or ()), "")
    if config.is_encoder_decoder:
        raise ModelError(f"{name or config.model_type} is an encoder-decoder; probing needs a causal or a masked model")
    if name in MASKED.values() or (name.endswith("ForPreTraining") and config.model_type in MASKED):
        return True
    if name in CAUSAL.values() or name.endswith(("ForCausalLM", "LMHeadModel")):
        return False
    if not name and config.model_type in MASKED | CAUSAL:
        return config.model_type in MASKED and not getattr(config, "is_decoder", False)
    raise ModelError(
        f"{name or config.model_type} has no language-modelling head; give a causal or a masked language model"
    )


def _load(path: Path, config: PretrainedConfig, masked: bool, device: torch.device) -> PreTrainedModel:
    kind: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    dtype = torch.float32 if device.type == "cpu" else stored_dtype(config)
    return load(kind, path, device, dtype=dtype, generation_config=GenerationConfig())

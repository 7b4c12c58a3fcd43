"""A language model in memory that can be asked how likely texts are."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

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

from lillama.errors import ModelError, ProbeError
from lillama.model.kind import kind_of
from lillama.model.load import load
from lillama.model.skeleton import skeleton
from lillama.model.source import load_config, locate
from lillama.model.spec import Kind
from lillama.model.tokenizer import load_tokenizer
from lillama.system.memory import tokens_of_logits

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
    kind = scored_kind(config)
    masked = kind.predicts == "masked"
    tokenizer = load_tokenizer(path)
    if masked and tokenizer.mask_token_id is None:
        raise ModelError(f"{model}: the tokenizer has no mask token, which pseudo-log-likelihood needs")
    bounds = [kind.max_positions, tokenizer.model_max_length]
    longest = min((bound for bound in bounds if bound and 0 < bound < 10**9), default=None)
    at_once = batch_tokens or min(TOKENS_AT_ONCE, tokens_of_logits(config.get_text_config().vocab_size))
    loaded = load(path, device, AutoModelForMaskedLM if masked else AutoModelForCausalLM, generation=GenerationConfig())
    return Scorer(str(model), loaded, tokenizer, masked, at_once, longest)


def scored_kind(config: PretrainedConfig) -> Kind:
    """Return the kind of a model that fills masks or continues texts.

    A configuration that names no class stands for the one with a head that transformers has for it.

    Raises:
        ModelError: it does neither.
    """
    if not config.architectures:
        decodes = getattr(config, "is_decoder", False) or config.model_type not in MASKED
        heads = cast(Mapping[str, str], CAUSAL if decodes else MASKED)
        head = heads.get(config.model_type)
        config = copy.deepcopy(config)
        config.architectures = None if head is None else [head]
    model = skeleton(config)
    kind, name = kind_of(model), type(model).__name__
    if kind.stacks > 1:
        raise ModelError(f"{name} is an encoder-decoder; probing needs a causal or a masked model")
    if kind.predicts == "nothing":
        raise ModelError(f"{name} has no language-modelling head; give a causal or a masked language model")
    return kind

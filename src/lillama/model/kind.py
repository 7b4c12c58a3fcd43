"""What kind of model it is, told from its class and its configuration, in one place."""

from typing import Literal

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

from lillama.errors import ModelError
from lillama.model.spec import Kind


def kind_of(model: PreTrainedModel) -> Kind:
    """Tell what a model, or its skeleton, takes and what it predicts.

    Examples:
        >>> from transformers import BertConfig
        >>> from lillama.model.skeleton import skeleton
        >>> kind = kind_of(skeleton(BertConfig(num_hidden_layers=1, architectures=["BertForMaskedLM"])))
        >>> kind.takes, kind.predicts, kind.stacks, kind.max_positions
        ('input_ids', 'masked', 1, 512)
    """
    config = model.config
    return Kind(
        takes=model.main_input_name,
        predicts=_predicts(model),
        stacks=2 if config.is_encoder_decoder else 1,
        max_positions=getattr(config.get_text_config(), "max_position_embeddings", None),
        max_source_positions=getattr(config, "max_source_positions", None),
        max_target_positions=getattr(config, "max_target_positions", None),
        decoder_start=getattr(config, "decoder_start_token_id", None),  # some have it in the generation settings only
    )


def _predicts(model: PreTrainedModel) -> Literal["next", "masked", "nothing"]:
    name, config = type(model).__name__, model.config
    if model.get_output_embeddings() is None:
        return "nothing"
    masked = name in MASKED.values() or (name.endswith("ForPreTraining") and config.model_type in MASKED)
    return "masked" if masked and not config.is_encoder_decoder else "next"  # BART's class is named in both ways


def refuse_too_long(seq_len: int, kind: Kind) -> None:
    """Raise `ModelError` where sequences are longer than the model's context."""
    if kind.max_positions is not None and seq_len > kind.max_positions:
        raise ModelError(f"seq_len is {seq_len}, but the model has {kind.max_positions} positions; lower --seq-len")

"""What a model takes and predicts is read off its class and its configuration."""

import json
from dataclasses import asdict

import pytest
from transformers import (
    BartConfig,
    BertConfig,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PretrainedConfig,
    Wav2Vec2Config,
    WhisperConfig,
)

from lillama.errors import ModelError
from lillama.model.describe import describe
from lillama.model.kind import kind_of, refuse_too_long
from lillama.model.skeleton import skeleton
from lillama.model.spec import Kind

SPEECH = WhisperConfig(max_source_positions=50, max_target_positions=64, decoder_start_token_id=3)
KNOWN = {
    "LlamaForCausalLM": (LlamaConfig(max_position_embeddings=40), Kind(max_positions=40)),
    "LlamaForSequenceClassification": (LlamaConfig(), Kind(predicts="nothing", max_positions=2048)),
    "GPT2LMHeadModel": (GPT2Config(n_positions=30), Kind(max_positions=30)),
    "MambaForCausalLM": (MambaConfig(), Kind()),
    "BertForMaskedLM": (BertConfig(), Kind(predicts="masked", max_positions=512)),
    "BertForPreTraining": (BertConfig(), Kind(predicts="masked", max_positions=512)),
    "BertLMHeadModel": (BertConfig(is_decoder=True), Kind(max_positions=512)),
    "BertModel": (BertConfig(), Kind(predicts="nothing", max_positions=512)),
    "BartForConditionalGeneration": (BartConfig(), Kind(stacks=2, max_positions=1024, decoder_start=2)),
    "WhisperForConditionalGeneration": (
        SPEECH,
        Kind("input_features", stacks=2, max_source_positions=50, max_target_positions=64, decoder_start=3),
    ),
    "Wav2Vec2Model": (Wav2Vec2Config(), Kind("input_values", "nothing")),
    "CLIPVisionModel": (CLIPVisionConfig(), Kind("pixel_values", "nothing")),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_kind_is_told_by_class_and_configuration(name: str) -> None:
    config, kind = KNOWN[name]
    config.architectures = [name]
    assert kind_of(skeleton(config)) == kind
    assert Kind(**json.loads(json.dumps(asdict(kind)))) == kind


def test_only_one_stack_that_goes_on_is_causal() -> None:
    assert Kind().causal and Kind("pixel_values").causal
    assert not Kind(stacks=2).causal and not Kind(predicts="masked").causal and not Kind(predicts="nothing").causal


def test_sequences_longer_than_the_context_are_refused() -> None:
    refuse_too_long(40, Kind(max_positions=40))
    refuse_too_long(10**9, Kind())
    with pytest.raises(ModelError, match="seq_len is 41, but the model has 40 positions; lower --seq-len"):
        refuse_too_long(41, Kind(max_positions=40))


def test_a_description_tells_the_kind() -> None:
    config: PretrainedConfig = LlamaConfig(max_position_embeddings=40, num_hidden_layers=1)
    config.architectures = ["LlamaForCausalLM"]
    assert describe(config).kind == Kind(max_positions=40)

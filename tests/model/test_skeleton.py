from collections.abc import Callable
from typing import Any

import pytest
from transformers import BertConfig, LlamaConfig, PretrainedConfig

from lillama.errors import ModelError
from lillama.model.skeleton import skeleton
from lillama.system.resources import peak_memory


def test_a_skeleton_keeps_real_buffers_and_leaves_the_configuration_alone(
    config: Callable[..., PretrainedConfig],
) -> None:
    made = config(LlamaConfig)
    before = made.to_dict()
    built = skeleton(made)
    assert built.config is not made and made.to_dict() == before
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in built.parameters())
    assert all(not buffer.is_meta for buffer in built.buffers()) and not built.training


SIZES: dict[str, tuple[dict[str, Any], str]] = {
    "vocabulary": ({"vocab_size": 10**13}, "larger than any model"),
    "vocabulary of thirty digits": ({"vocab_size": 10**30}, "larger than any model"),
    "width": ({"hidden_size": 10**9, "intermediate_size": 10**9}, "larger than any model"),
    "inner width": ({"intermediate_size": 1 << 62}, "larger than any model"),
    "heads": ({"head_dim": 10**12}, "longer than any model's|larger than any model"),
    "positions": ({"kind": BertConfig, "max_position_embeddings": 10**10}, "longer than any model's|larger than any"),
    "no heads": ({"num_attention_heads": 0}, "LlamaForCausalLM cannot be built"),
    "less than nothing": ({"intermediate_size": -8}, "LlamaForCausalLM cannot be built"),
    "a word": ({"hidden_act": "no such function"}, "LlamaForCausalLM cannot be built .*no such function"),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_that_no_model_has_are_refused_before_memory_is_taken(case: str) -> None:
    changes, match = SIZES[case]
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
    kind = changes.get("kind", LlamaConfig)
    made = kind(architectures=["BertLMHeadModel" if kind is BertConfig else "LlamaForCausalLM"])
    for key, value in (shape | changes).items():
        if key != "kind":
            object.__setattr__(made, key, value)  # past the checks of the configuration's own class
    peak = peak_memory()
    with pytest.raises(ModelError, match=match) as refusal:
        skeleton(made)
    assert str(refusal.value).isprintable() and peak_memory() < peak + (64 << 20)


def test_a_model_of_endless_parts_is_refused(config: Callable[..., PretrainedConfig], monkeypatch) -> None:
    monkeypatch.setattr("lillama.model.skeleton.MOST_TENSORS", 20)
    with pytest.raises(ModelError, match="more than 20 tensors"):
        skeleton(config(LlamaConfig))


def test_a_class_that_transformers_does_not_have_is_refused(config: Callable[..., PretrainedConfig]) -> None:
    made = config(LlamaConfig)
    made.architectures = ["LlamaForCausalLN"]
    with pytest.raises(ModelError, match="did you mean 'LlamaForCausalLM'"):
        skeleton(made)

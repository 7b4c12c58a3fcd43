from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    T5Config,
)

from lillama.errors import ModelError
from lillama.model.describe import describe, describe_model, matches
from lillama.model.spec import LinearSpec

GATED = [f"self_attn.{name}_proj" for name in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
PLAIN = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"]
KINDS = [
    (LlamaConfig, GATED),
    (MistralConfig, GATED),
    (Qwen2Config, GATED),
    (Gemma2Config, GATED),
    (PhiConfig, PLAIN),
]
Make = Callable[..., PretrainedConfig]


@pytest.mark.parametrize(("kind", "linears"), KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_description_agrees_with_the_real_model(
    kind: type[PretrainedConfig], linears: list[str], tied: bool, config: Make
) -> None:
    made = config(kind, tie_word_embeddings=tied, dtype="bfloat16")
    spec = describe(made)
    model = AutoModelForCausalLM.from_config(made)
    assert spec.architecture == type(model).__name__ and (spec.dtype, spec.bytes_per_param) == ("bfloat16", 2)
    assert spec.params == model.num_parameters()
    assert [block.name for block in spec] == [f"model.layers.{i}" for i in range(3)]
    assert [block.index for block in spec] == [0, 1, 2]
    for block in spec:
        module = model.get_submodule(block.name)
        assert block.params == sum(parameter.numel() for parameter in module.parameters())
        assert sorted(linear.name for linear in block.linears) == sorted(f"{block.name}.{name}" for name in linears)
    for linear in spec.linears:
        assert model.get_submodule(linear.name).weight.shape == (linear.out_features, linear.in_features)
    assert spec.params - spec.block_params >= 96 * 32 * (1 if tied else 2)


def test_a_loaded_model_is_described_as_its_configuration(config: Make) -> None:
    made = config(LlamaConfig)
    assert describe_model(AutoModelForCausalLM.from_config(made)) == describe(made)


def test_a_configuration_without_a_type_means_fp32(config: Make) -> None:
    assert describe(config(LlamaConfig)).dtype == "float32"


@pytest.mark.parametrize(
    ("targets", "ignore", "wanted"),
    [
        (["mlp.*"], [], {"gate_proj", "up_proj", "down_proj"}),
        (["model.layers.*.mlp.up_proj"], [], {"up_proj"}),
        (["*"], ["self_attn.*"], {"gate_proj", "up_proj", "down_proj"}),
        (["*"], ["*.k_proj", "mlp.*"], {"q_proj", "v_proj", "o_proj"}),
        (["*_proj"], ["*down*", "*self_attn*"], {"gate_proj", "up_proj"}),
    ],
)
def test_globs_match_full_names_and_names_within_the_block(
    targets: list[str], ignore: list[str], wanted: set[str], config: Make
) -> None:
    for block in describe(config(LlamaConfig), targets, ignore):
        assert {linear.name.rpartition(".")[2] for linear in block.linears} == wanted


def test_globs_may_choose_blocks(config: Make) -> None:
    spec = describe(config(LlamaConfig), ["model.layers.[02].*"], ["model.layers.2.self_attn.*"])
    assert [len(block.linears) for block in spec] == [7, 0, 3]
    assert matches("model.layers.1.mlp.up_proj", "model.layers.1", ["mlp.up_*"])
    assert not matches("model.layers.1.mlp.up_proj", "model.layers.1", ["up_*"])


def test_a_linear_breaks_even_where_its_factors_are_as_large() -> None:
    linear = LinearSpec("up", 120, 60)
    assert linear.break_even_rank == 40 and linear.params_at(40) == linear.params == linear.params_at(None)


@pytest.mark.parametrize(
    ("quantized", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"already quantised \(bitsandbytes\)"),
        ({"quant_method": "lillama", "ranks": {}}, "already compressed by lillama"),
        ({}, r"already quantised \(unknown\)"),
    ],
)
def test_a_quantised_or_compressed_model_is_refused(quantized: dict[str, object], message: str, config: Make) -> None:
    made = config(LlamaConfig)
    made.quantization_config = quantized
    with pytest.raises(ModelError, match=message):
        describe(made)


def test_globs_that_match_nothing_are_refused(config: Make) -> None:
    with pytest.raises(ModelError, match=r"targets mpl\.\* without lm_head: no linear matches"):
        describe(config(LlamaConfig), ["mpl.*"], ["lm_head"])


def test_fused_experts_are_refused_and_not_skipped(config: Make) -> None:
    with pytest.raises(
        ModelError, match=r"MixtralForCausalLM: model\.layers\.0\.mlp\.experts\.gate_up_proj is a fused"
    ):
        describe(config(MixtralConfig, num_local_experts=4))


def test_two_stacks_are_refused() -> None:
    config = T5Config(vocab_size=96, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
    config.architectures = ["T5ForConditionalGeneration"]
    with pytest.raises(ModelError, match=r"found encoder\.block, decoder\.block"):
        describe(config)


def test_a_model_without_linears_in_its_blocks_is_refused() -> None:
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    config.architectures = ["GPT2LMHeadModel"]
    with pytest.raises(ModelError, match="one stack of blocks with linears is needed, found none"):
        describe(config)


@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        (
            ["LlamaForCausalML"],
            "LlamaForCausalML, which transformers .* does not have; did you mean 'LlamaForCausalLM'",
        ),
        (["LlamaConfig"], "LlamaConfig, which transformers"),
        (["torch"], "torch, which transformers"),
        ([], "names no model class"),
        (None, "names no model class"),
    ],
)
def test_an_unknown_class_is_refused(architectures: list[str] | None, message: str, config: Make) -> None:
    made = config(LlamaConfig)
    made.architectures = architectures
    with pytest.raises(ModelError, match=message) as refusal:
        describe(made)
    assert "\n" not in str(refusal.value)


def test_values_that_no_model_can_have_are_refused(config: Make) -> None:
    made = config(LlamaConfig)
    made.hidden_act = "no_such_function"
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot be built with these values: .*no_such_function"):
        describe(made)


def test_a_description_takes_no_memory_for_weights(config: Make) -> None:
    made = config(LlamaConfig, hidden_size=8192, intermediate_size=65536, num_attention_heads=64, vocab_size=200_000)
    assert describe(made).params > 5e9
    assert torch.get_default_device() == torch.device("cpu")

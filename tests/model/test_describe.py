from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    ResNetConfig,
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


def test_every_expert_counts_as_its_own_linears_and_the_router_as_none(config: Make) -> None:
    spec = describe(config(MixtralConfig, num_local_experts=4))
    inside = {linear.name.removeprefix("model.layers.1.") for linear in spec.blocks[1].linears}
    experts = {f"mlp.experts.{expert}.{leaf}" for expert in range(4) for leaf in ("gate_up", "down")}
    assert inside == experts | {f"self_attn.{name}_proj" for name in "qkvo"}
    shapes = {linear.name.rpartition(".")[2]: linear for linear in spec.blocks[1].linears}
    assert (shapes["gate_up"].out_features, shapes["gate_up"].in_features) == (96, 32)
    assert (shapes["down"].out_features, shapes["down"].in_features) == (32, 48)
    assert (shapes["down"].share, shapes["q_proj"].share) == (0.5, 1.0)  # two experts of four for each token
    assert spec.params == AutoModelForCausalLM.from_config(config(MixtralConfig, num_local_experts=4)).num_parameters()


def test_an_encoder_decoder_has_the_blocks_of_both_stacks() -> None:
    config = T5Config(vocab_size=96, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
    config.architectures = ["T5ForConditionalGeneration"]
    names = ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]
    assert [block.name for block in describe(config)] == names


def test_a_transposed_weight_is_described_by_what_it_computes() -> None:
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    config.architectures = ["GPT2LMHeadModel"]
    shapes = {one.name: (one.out_features, one.in_features) for one in describe(config).blocks[0].linears}
    assert shapes["transformer.h.0.attn.c_attn"] == (96, 32) and shapes["transformer.h.0.mlp.c_proj"] == (32, 128)


def test_of_several_modalities_the_language_tower_is_taken() -> None:
    config = LlavaConfig(
        text_config={"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "vocab_size": 96},
        vision_config={"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48,
                       "num_hidden_layers": 3, "num_attention_heads": 4},
        architectures=["LlavaForConditionalGeneration"],
    )  # fmt: skip
    assert [block.name for block in describe(config)] == [f"model.language_model.layers.{i}" for i in range(2)]


def test_pairs_that_are_low_rank_already_are_left_alone() -> None:
    config = DeepseekV3Config(
        vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
        first_k_dense_replace=1, q_lora_rank=12, kv_lora_rank=12, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        architectures=["DeepseekV3ForCausalLM"],
    )  # fmt: skip
    attention = {one.name.rpartition(".")[2] for one in describe(config).blocks[0].linears if "attn" in one.name}
    assert attention == {"q_b_proj", "kv_b_proj", "o_proj"}


def test_state_space_linears_whose_weights_are_read_past_the_module_stay_dense() -> None:
    config = MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, architectures=["MambaForCausalLM"])
    assert {one.name.rpartition(".")[2] for one in describe(config).linears} == {"in_proj", "out_proj"}


def test_a_model_without_a_stack_is_refused() -> None:
    config = ResNetConfig(architectures=["ResNetModel"])
    with pytest.raises(ModelError, match="ResNetModel: 1 stack of repeated blocks with linears needed, found 0"):
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
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot be built with these values .*no_such_function"):
        describe(made)


def test_a_description_takes_no_memory_for_weights(config: Make) -> None:
    made = config(LlamaConfig, hidden_size=8192, intermediate_size=65536, num_attention_heads=64, vocab_size=200_000)
    assert describe(made).params > 5e9
    assert torch.get_default_device() == torch.device("cpu")

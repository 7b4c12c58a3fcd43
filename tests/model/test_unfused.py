"""Linears in the place of fused weights compute the same, and can be put back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4ForCausalLM
from transformers.pytorch_utils import Conv1D

from lillama.lowrank.install import install, merge
from lillama.modeling.experts import Experts, fuse, is_fused, native_names, unfuse

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
KINDS: dict[str, Callable[[], nn.Module]] = {
    "Mixtral": lambda: AutoModelForCausalLM.from_config(MixtralConfig(**SHAPE)),
    "Qwen3-MoE": lambda: AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SHAPE)),
    "GPT-OSS, transposed and biased": lambda: AutoModelForCausalLM.from_config(GptOssConfig(**SHAPE)),
    "Llama 4, without routing": lambda: Llama4ForCausalLM(Llama4TextConfig(**SHAPE, intermediate_size_mlp=40)),
    "GPT-2, transposed": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1)
    ),
}
IDS = torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made = KINDS[request.param]().eval().requires_grad_(False)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


@pytest.fixture(params=[False, True], ids=["gate and up as one", "gate and up apart"])
def split(request: pytest.FixtureRequest) -> Callable[[str], bool]:
    return lambda _: request.param


def test_linears_compute_the_same_and_hold_the_very_numbers(model: nn.Module, split: Callable[[str], bool]) -> None:
    wanted, numbers = model(IDS).logits, sum(parameter.numel() for parameter in model.parameters())
    before = {parameter.data_ptr() for parameter in model.parameters()}
    unfuse(model, split=split)
    assert not any(is_fused(module) or isinstance(module, Conv1D) for module in model.modules())
    torch.testing.assert_close(model(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    assert sum(parameter.numel() for parameter in model.parameters()) == numbers
    assert before <= {parameter.data_ptr() for parameter in model.parameters()}  # views, nothing was copied


def test_what_was_unfused_is_fused_again(model: nn.Module, split: Callable[[str], bool]) -> None:
    wanted, state = model(IDS).logits, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    unfuse(model, split=split)
    fuse(model)
    assert [type(module) for module in model.modules()] == kinds
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(model(IDS).logits, wanted)


def test_factorised_and_merged_a_model_has_its_own_classes(model: nn.Module) -> None:
    shapes, kinds = {n: t.shape for n, t in model.state_dict().items()}, [type(module) for module in model.modules()]
    opened = opened_names(model)
    install(model, dict.fromkeys(opened, 3))
    assert sum(tensor.numel() == 0 for tensor in model.state_dict().values()) >= len(opened)
    merge(model)
    assert {n: t.shape for n, t in model.state_dict().items()} == shapes
    assert [type(module) for module in model.modules()] == kinds


def opened_names(model: nn.Module) -> list[str]:
    """Return the name of a linear of one expert, or of one Conv1D."""
    holder = next(
        (name, module) for name, module in model.named_modules() if is_fused(module) or isinstance(module, Conv1D)
    )
    return [holder[0]] if isinstance(holder[1], Conv1D) else [f"{holder[0]}.{index}.down" for index in (1, 3)]


def test_one_expert_can_be_smaller_than_another() -> None:
    model = KINDS["Mixtral"]().requires_grad_(False)
    prefix = "model.layers.1.mlp.experts"
    install(model, {f"{prefix}.0.down": 5, f"{prefix}.2.down": 9, f"{prefix}.2.gate_up": 7})
    experts = model.get_submodule(prefix)
    assert isinstance(experts, Experts)
    assert [getattr(experts.get_submodule(f"{index}.down"), "rank", None) for index in range(4)] == [5, None, 9, None]
    assert isinstance(experts.get_submodule("1.gate_up"), nn.Linear) and model(IDS).logits.isfinite().all()
    assert not isinstance(model.get_submodule("model.layers.0.mlp.experts"), Experts)


def test_gate_and_up_are_apart_where_one_of_them_is_named() -> None:
    model = KINDS["Mixtral"]().requires_grad_(False)
    prefix = "model.layers.1.mlp.experts"
    install(model, {f"{prefix}.0.down": 5, f"{prefix}.2.gate": 7})
    experts = model.get_submodule(prefix)
    assert isinstance(experts, Experts) and experts.leaves == ("gate", "up", "down")
    assert [leaf for leaf, _ in experts.get_submodule("2").named_children()] == ["gate", "up", "down"]
    assert model(IDS).logits.isfinite().all()


def test_gate_and_up_that_all_stay_dense_are_joined_again() -> None:
    model = KINDS["Mixtral"]().requires_grad_(False)
    prefix = "model.layers.1.mlp.experts"
    unfuse(model, split=lambda _: True)
    install(model, {f"{prefix}.2.down": 9})
    wanted = model(IDS).logits
    fuse(model)
    experts = model.get_submodule(prefix)
    assert isinstance(experts, Experts) and experts.leaves == ("gate_up", "down")
    assert experts.get_submodule("0.gate_up").weight.shape == (96, 32)
    torch.testing.assert_close(model(IDS).logits, wanted)


def test_tokens_come_to_the_experts_that_were_chosen() -> None:
    experts = Experts(KINDS["Mixtral"]().get_submodule("model.layers.0.mlp.experts"))
    chosen = torch.tensor([[3, 0], [0, 1], [3, 1]])
    assert [tokens.tolist() for tokens in experts.tokens(chosen)] == [[0, 1], [1, 2], [], [0, 2]]


def test_native_names_tell_what_a_linear_is_part_of() -> None:
    model = KINDS["GPT-OSS, transposed and biased"]()
    unfuse(model)
    names = native_names(model)
    assert names["model.layers.1.mlp.experts.2.gate_up.bias"] == "model.layers.1.mlp.experts.gate_up_proj_bias"
    assert names["model.layers.0.mlp.experts.3.down.weight"] == "model.layers.0.mlp.experts.down_proj"
    assert len(names) == 2 * 4 * 4


def test_native_names_of_gate_and_up_apart() -> None:
    model = KINDS["Mixtral"]()
    unfuse(model, split=lambda _: True)
    names = native_names(model)
    assert {names[f"model.layers.1.mlp.experts.2.{leaf}.weight"] for leaf in ("gate", "up")} == {
        "model.layers.1.mlp.experts.gate_up_proj"
    }

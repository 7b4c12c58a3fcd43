"""Which linears form a feed-forward network whose neurons stand by themselves.

That they do is shown by the rows of all architectures: there a network of half of its neurons computes what its dense copy
does, which has zeros behind the others.
"""

import pytest
from tests.architectures.rows import ROWS
from torch import nn

from lillama.model.describe import describe
from lillama.model.ffn import find_ffns
from lillama.model.spec import FfnSpec, LinearSpec

NONE = {
    "Phi-3, 4", "Mixtral", "Qwen 3 MoE", "OLMoE", "Granite MoE", "GPT-OSS", "Mamba", "Mamba 2", "Falcon Mamba", "RWKV",
    "ModernBERT",
}  # fmt: skip


def gated(neurons: int = 56, **others: nn.Module) -> nn.ModuleDict:
    """A block with a gated network, and what stands beside it."""
    linears = {
        "gate_proj": nn.Linear(32, neurons),
        "up_proj": nn.Linear(32, neurons),
        "down_proj": nn.Linear(neurons, 32),
    }
    return nn.ModuleDict({"mlp": nn.ModuleDict(linears | others)})


def linears_of(block: nn.Module) -> list[LinearSpec]:
    return [
        LinearSpec(name, module.out_features, module.in_features)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]


def test_all_other_architectures_have_networks_that_may_be_narrower() -> None:
    without = {name for name, row in ROWS.items() if not describe(row.configuration()).ffns}
    assert without == NONE


def test_a_network_with_a_linear_that_stays_dense_is_left_as_it_is() -> None:
    config = ROWS["Mistral"].configuration()
    assert describe(config).ffns and not describe(config, ignore=("*up_proj",)).ffns


def test_a_gated_network_is_found_with_its_biases() -> None:
    block = gated()
    wanted = FfnSpec(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", 56, biases=2)
    assert find_ffns(block, linears_of(block)) == (wanted,)


@pytest.mark.parametrize(
    "block",
    [
        gated(norm=nn.LayerNorm(56)),  # looks at all neurons at once
        gated(neurons=32),  # as many as the model is wide: nothing tells what else has their number
        nn.ModuleDict({"up_proj": nn.Linear(32, 56), "other_down_proj": nn.Linear(56, 32)}),
        nn.ModuleDict({"gate_proj": nn.Linear(32, 48), "up_proj": nn.Linear(32, 56), "down_proj": nn.Linear(48, 32)}),
    ],
    ids=["a norm between", "as wide as the model", "another name", "other sizes"],
)
def test_what_may_be_no_such_network_is_left_as_it_is(block: nn.Module) -> None:
    assert find_ffns(block, linears_of(block)) == ()


def test_experts_keep_their_width() -> None:
    block = gated()
    shared = [LinearSpec(one.name, one.out_features, one.in_features, share=0.5) for one in linears_of(block)]
    assert find_ffns(block, shared) == ()

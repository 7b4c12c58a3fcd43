"""Which linears form a feed-forward network whose neurons stand by themselves."""

import copy
from inspect import signature

import pytest
import torch
from tests.architectures.rows import ROWS
from torch import nn

from lillama.lowrank.install import narrow
from lillama.lowrank.student import NarrowFfn, narrow_teacher
from lillama.model.describe import describe, find_stacks
from lillama.model.skeleton import skeleton
from lillama.model.spec import FfnSpec
from lillama.modeling.experts import unfuse

NONE = {
    "Phi-3, 4", "Mixtral", "Qwen 3 MoE", "OLMoE", "Granite MoE", "GPT-OSS", "Mamba", "Mamba 2", "Falcon Mamba", "RWKV",
    "ModernBERT",
}  # fmt: skip


def test_all_other_architectures_have_networks_that_may_be_narrower() -> None:
    without = {name for name, row in ROWS.items() if not describe(row.configuration()).ffns}
    assert without == NONE


def test_a_network_with_a_linear_that_stays_dense_is_left_as_it_is() -> None:
    config = ROWS["Mistral"].configuration()
    assert describe(config).ffns and not describe(config, ignore=("*up_proj",)).ffns


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in ROWS if name not in NONE])
def test_neurons_with_nothing_behind_them_may_go(name: str) -> None:
    """Whatever lies between the linears of a network, no neuron looks at another one."""
    for block, ffn in _blocks_with_ffns(name):
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        gone = torch.arange(0, ffn.neurons, 3)
        block.get_submodule(ffn.outward).weight[:, gone] = 0
        kept = tuple(index for index in range(ffn.neurons) if index % 3)
        small = copy.deepcopy(block)
        narrow(small, NarrowFfn(ffn.inward, ffn.outward, kept).shapes(block))
        for linear in ffn.inward:
            for own, whole in zip(*(one.get_submodule(linear).parameters() for one in (small, block)), strict=True):
                own.copy_(whole[list(kept)])
        outward, whole_outward = small.get_submodule(ffn.outward), block.get_submodule(ffn.outward)
        outward.weight.copy_(whole_outward.weight[:, list(kept)])
        if outward.bias is not None:
            outward.bias.copy_(whole_outward.bias)
        own, whole = _ffn_outputs(block, small, ffn)
        torch.testing.assert_close(own, whole)


def _blocks_with_ffns(name: str) -> list[tuple[nn.Module, FfnSpec]]:
    """Return the last block of an architecture, on the CPU, with each of its networks by names within it."""
    config = ROWS[name].configuration()
    model, spec = skeleton(config), describe(config)
    assert find_stacks(model)
    block = next(block for block in reversed(spec.blocks) if block.ffns)
    module = copy.deepcopy(model.get_submodule(block.name)).to_empty(device="cpu").float().eval()
    unfuse(module)
    return [
        (module, FfnSpec(tuple(map(block.inner, ffn.inward)), block.inner(ffn.outward), ffn.neurons))
        for ffn in block.ffns
    ]


def _ffn_outputs(block: nn.Module, small: nn.Module, ffn: FfnSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Run both from what enters the linears to what leaves the last one, by the module that holds them."""
    holder = ffn.outward.rpartition(".")[0]
    if not holder or not ffn.inward[0].startswith(f"{holder}."):  # the block itself holds them, with its own activation
        pytest.skip("the network is no module of its own")
    x = torch.randn(2, 5, block.get_submodule(ffn.inward[0]).weight.shape[1])
    modules = [one.get_submodule(holder) for one in (small, block)]
    residual = [torch.zeros(2, 5, small.get_submodule(ffn.outward).weight.shape[0])]
    given = [x, *(residual if "residual" in signature(modules[0].forward).parameters else [])]
    own, whole = (module(*given) for module in modules)
    return own, whole


def test_a_narrower_block_keeps_what_it_shares_with_the_whole_one() -> None:
    block, _ = _blocks_with_ffns("Mistral")[0]
    template, teacher = narrow_teacher(block, block, [], {})
    assert template is block and teacher is block

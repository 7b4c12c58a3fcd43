"""The stores around a block: what is computed ahead, what a child returns, what adapts."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from lillama.distill.activations import BlockActivations
from lillama.distill.block import BlockData
from lillama.errors import RecipeError
from lillama.stream.activations import ActivationPlacement, ActivationStore
from lillama.stream.calls import BlockArgs, BlockInputs

SHAPE = (7, 6, 12)


@dataclass
class Setting:
    """Activations before the first of three blocks."""

    activations: BlockActivations
    blocks: list[nn.Module] = field(default_factory=list)

    def everything(self, store: ActivationStore) -> Tensor:
        return store.read(slice(0, SHAPE[0]))


@pytest.fixture(params=["host", "disk"])
def setting(toy, tmp_path, request) -> Setting:
    placement = ActivationPlacement(torch.device("cpu"), tmp_path / "scratch", 0, 0)
    stores = [
        ActivationStore(SHAPE, torch.float32, placement, request.param, n) for n in ("teacher", "target", "student")
    ]
    stores[0].write(slice(0, SHAPE[0]), torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    activations = BlockActivations(BlockInputs([BlockArgs()] * 3), stores[0], stores[1], None, stores[2], (None,), 3)
    torch.manual_seed(1)
    return Setting(activations, [type(toy.teacher)() for _ in range(3)])


def test_looking_ahead_gives_the_next_blocks_target(setting):
    activations, (first, second, third) = setting.activations, setting.blocks
    x = setting.everything(activations.teacher)
    for index, (block, following) in enumerate(((first, second), (second, third))):
        activations.compute_target(index, block)
        activations.compute_next_target(index, following)
        data = BlockData(activations, index, "teacher", following)
        x = block(x)[0].detach()
        torch.testing.assert_close(setting.everything(activations.target), x)
        (micro,) = data.micro_batches(torch.tensor([2, 5]))
        torch.testing.assert_close(micro.ahead.call(following, micro.target), micro.ahead.target)
        ahead = setting.everything(activations.next_target)
        activations.advance(index, None)
    activations.compute_target(2, third)
    torch.testing.assert_close(setting.everything(activations.target), ahead)
    assert activations.next_target is None


def test_children_are_recorded_on_the_teachers_stream(setting):
    activations, (first, second, _) = setting.activations, setting.blocks
    x = setting.everything(activations.teacher)
    activations.compute_target(0, first, ["up", "down"])
    parts = activations.parts
    torch.testing.assert_close(setting.everything(parts["up"]), first.up(x).detach())
    torch.testing.assert_close(setting.everything(parts["down"]), first.down(torch.tanh(first.up(x))).detach())
    activations.advance(0, second)
    activations.compute_target(1, second)
    assert not activations.parts


def test_an_uncalled_child_is_refused_by_name(setting):
    setting.blocks[0].spare = nn.Linear(2, 2)
    with pytest.raises(RecipeError, match=r"sub_blocks: spare .* not called .* set distill.sub_blocks to 0"):
        setting.activations.compute_target(0, setting.blocks[0], ["spare"])


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_target_adapts_by_its_share(setting, share):
    activations, (first, second, third) = setting.activations, setting.blocks
    activations.compute_target(0, first)
    activations.blend_target(0, first, share)
    assert activations.own_target is None  # the activations have not parted yet
    activations.advance(0, third)  # plays a finished student
    activations.compute_target(1, second)
    activations.blend_target(1, second, share)
    x, own = setting.everything(activations.teacher), setting.everything(activations.student)
    assert not torch.allclose(x, own)
    expected = (1 - share) * second(x)[0] + share * second(own)[0]
    torch.testing.assert_close(setting.everything(activations.own_target), expected.detach())
    activations.advance(1, second)
    assert activations.own_target is None


def test_no_share_costs_no_store(setting):
    activations, (first, second, _) = setting.activations, setting.blocks
    activations.compute_target(0, first)
    activations.advance(0, second)
    activations.compute_target(1, second)
    activations.blend_target(1, second, 0.0)
    assert activations.own_target is None


def test_all_stores_are_given_back(setting, tmp_path):
    activations, (first, second, third) = setting.activations, setting.blocks
    activations.compute_target(0, first, ["up"])
    activations.compute_next_target(0, second)
    activations.advance(0, third)
    activations.compute_target(1, second)
    activations.blend_target(1, second, 0.5)
    activations.remove()
    assert not list((tmp_path / "scratch").glob("*"))


def test_one_run_serves_target_and_grams(setting):
    activations, (first, _, _) = setting.activations, setting.blocks
    calls = []
    first.register_forward_hook(lambda *_: calls.append(1))
    x = setting.everything(activations.teacher)
    grams = activations.compute_target(0, first, linears=["up"])
    assert len(calls) == 3 and list(grams) == ["up"]
    torch.testing.assert_close(
        grams["up"].sum, (x.flatten(0, 1).double().T @ x.flatten(0, 1).double()), rtol=1e-5, atol=1e-5
    )

"""The stores around a block: what is computed ahead, what a child returns, what adapts."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from lillama.distill.streams import Streams
from lillama.errors import RecipeError
from lillama.stream.calls import BlockArgs, BlockInputs
from lillama.stream.store import ActivationStore, Shelf

SHAPE = (7, 6, 12)


@dataclass
class Setting:
    """Streams before the first of three blocks."""

    streams: Streams
    blocks: list[nn.Module] = field(default_factory=list)

    def everything(self, store: ActivationStore) -> Tensor:
        return store.read(slice(0, SHAPE[0]))


@pytest.fixture(params=["host", "disk"])
def setting(toy, tmp_path, request) -> Setting:
    shelf = Shelf(torch.device("cpu"), tmp_path / "scratch", 0, 0)
    stores = [ActivationStore(SHAPE, torch.float32, shelf, request.param, n) for n in ("teacher", "target", "student")]
    stores[0].write(slice(0, SHAPE[0]), torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)))
    streams = Streams(BlockInputs([BlockArgs()] * 3), stores[0], stores[1], None, stores[2], (None,), 3)
    torch.manual_seed(1)
    return Setting(streams, [type(toy.teacher)() for _ in range(3)])


def test_looking_ahead_gives_the_next_blocks_target(setting):
    streams, (first, second, third) = setting.streams, setting.blocks
    x = setting.everything(streams.teacher)
    for index, (block, following) in enumerate(((first, second), (second, third))):
        streams.teach(index, block)
        streams.look_ahead(index + 1, following)
        data = streams.data(index, "teacher", following)
        x = block(x)[0].detach()
        torch.testing.assert_close(setting.everything(data.target), x)
        (micro,) = data.micro_batches(torch.tensor([2, 5]))
        torch.testing.assert_close(micro.ahead.call(following, micro.target), micro.ahead.target)
        ahead = setting.everything(data.following.target)
        streams.move_on(index, None)
    streams.teach(2, third)
    torch.testing.assert_close(setting.everything(streams.target), ahead)
    assert streams.data(2, "teacher").following is None


def test_children_are_recorded_on_the_teachers_stream(setting):
    streams, (first, second, _) = setting.streams, setting.blocks
    x = setting.everything(streams.teacher)
    streams.teach(0, first, ["up", "down"])
    parts = streams.data(0, "student").parts
    torch.testing.assert_close(setting.everything(parts["up"]), first.up(x).detach())
    torch.testing.assert_close(setting.everything(parts["down"]), first.down(torch.tanh(first.up(x))).detach())
    streams.move_on(0, second)
    streams.teach(1, second)
    assert not streams.data(1, "student").parts


def test_an_uncalled_child_is_refused_by_name(setting):
    setting.blocks[0].spare = nn.Linear(2, 2)
    with pytest.raises(RecipeError, match=r"sub_blocks: spare .* not called .* set distill.sub_blocks to 0"):
        setting.streams.teach(0, setting.blocks[0], ["spare"])


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_target_adapts_by_its_share(setting, share):
    streams, (first, second, third) = setting.streams, setting.blocks
    streams.teach(0, first)
    streams.adapt(0, first, share)
    assert streams.data(0, "student").own_target is None  # the streams have not parted yet
    streams.move_on(0, third)  # plays a finished student
    streams.teach(1, second)
    streams.adapt(1, second, share)
    x, own = setting.everything(streams.teacher), setting.everything(streams.student)
    assert not torch.allclose(x, own)
    expected = (1 - share) * second(x)[0] + share * second(own)[0]
    torch.testing.assert_close(setting.everything(streams.data(1, "student").own_target), expected.detach())
    streams.move_on(1, second)
    assert streams.own_target is None


def test_no_share_costs_no_store(setting):
    streams, (first, second, _) = setting.streams, setting.blocks
    streams.teach(0, first)
    streams.move_on(0, second)
    streams.teach(1, second)
    streams.adapt(1, second, 0.0)
    assert streams.data(1, "student").own_target is None


def test_all_stores_are_given_back(setting, tmp_path):
    streams, (first, second, third) = setting.streams, setting.blocks
    streams.teach(0, first, ["up"])
    streams.look_ahead(1, second)
    streams.move_on(0, third)
    streams.teach(1, second)
    streams.adapt(1, second, 0.5)
    streams.remove()
    assert not list((tmp_path / "scratch").glob("*"))


def test_one_run_serves_target_and_grams(setting):
    streams, (first, _, _) = setting.streams, setting.blocks
    calls = []
    first.register_forward_hook(lambda *_: calls.append(1))
    x = setting.everything(streams.teacher)
    grams = streams.teach(0, first, linears=["up"])
    assert len(calls) == 3 and list(grams) == ["up"]
    torch.testing.assert_close(
        grams["up"].sum, (x.flatten(0, 1).double().T @ x.flatten(0, 1).double()), rtol=1e-5, atol=1e-5
    )

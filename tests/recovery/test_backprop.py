"""Gradients that run back block by block equal those of plain autograd through all blocks at once."""

import copy
import weakref

import pytest
import torch
from torch import nn

from lillama.distill.config import DistillConfig
from lillama.distill.learner import Learner
from lillama.distill.pool import LearnerPool
from lillama.recovery.backprop import Chain, KeptGraphs, Part, Recomputed, graph_bytes
from lillama.stream.activations import ActivationPlacement, ActivationStore
from lillama.stream.calls import BlockArgs, BlockInputs

BATCH = torch.tensor([7, 2, 11, 5, 3])
TRAINED, BLOCKS = (1, 3, 4), range(1, 5)
SHAPE = (24, 6, 12)


class Block(nn.Module):
    """A residual block that returns a tuple, as many do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(SHAPE[-1], 20), nn.Linear(20, SHAPE[-1], bias=False)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor]:
        return (hidden + self.down(torch.tanh(self.up(hidden))),)


@pytest.fixture
def chain(tmp_path):
    """Return a function that makes a chain of four blocks, of which all but the second are trained."""
    torch.manual_seed(1)
    blocks = {index: Block().requires_grad_(False) for index in BLOCKS}
    placement = ActivationPlacement(torch.device("cpu"), tmp_path, 0, 1 << 30)
    inputs = ActivationStore(SHAPE, torch.float32, placement, "host", "inputs")
    inputs.write(slice(0, SHAPE[0]), torch.randn(SHAPE))

    def make(recomputed: bool, resident: int = 9) -> Chain:
        stores = {i: ActivationStore((8, *SHAPE[1:]), torch.float32, placement, "disk", f"b{i}") for i in BLOCKS}
        tape = Recomputed(stores) if recomputed else KeptGraphs()

        def learner(index: int) -> Learner:
            return Learner(copy.deepcopy(blocks[index]), DistillConfig().optim, 1e-3, 10)

        pool = LearnerPool(learner, tmp_path / "pool", resident)
        calls = BlockInputs([BlockArgs()] * 5)
        return Chain(pool, frozenset(TRAINED), blocks.__getitem__, BLOCKS, calls, inputs, tape)

    make.whole = nn.ModuleList([copy.deepcopy(blocks[i]) for i in BLOCKS])
    return make


def gradients(chain: Chain, micro_batch: int, slope: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = Part.of(BATCH, micro_batch)
    outputs = chain.forward(parts)
    torch.testing.assert_close(outputs, chain.outputs(parts), rtol=0, atol=0)
    assert not any(output.requires_grad for output in outputs)
    found = {}
    for index in chain.backward(parts, list(slope.split(micro_batch))):
        named = chain.pool[index].student.named_parameters()
        found |= {f"{index}.{name}": parameter.grad.clone() for name, parameter in named}
    return found


@pytest.mark.parametrize("micro_batch", [2, 5])
@pytest.mark.parametrize(("recomputed", "resident"), [(True, 9), (True, 1), (False, 9)])
def test_equal_those_of_plain_autograd(chain, recomputed, resident, micro_batch):
    made = chain(recomputed, resident)
    hidden = made.inputs.read(BATCH)
    slope = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    found = gradients(made, micro_batch, slope)
    for index in TRAINED:
        chain.whole[index - 1].requires_grad_(True)
    for block in chain.whole:
        hidden = block(hidden)[0]
    hidden.backward(slope)
    wanted = {f"{i}.{n}": p.grad for i in TRAINED for n, p in chain.whole[i - 1].named_parameters()}
    assert set(found) == set(wanted) and next(iter(found)).startswith("4.")
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)


def test_both_tapes_give_the_same_bits(chain):
    slope = torch.randn(5, 6, 12, generator=torch.Generator().manual_seed(2))
    kept, recomputed = gradients(chain(False), 2, slope), gradients(chain(True), 2, slope)
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in kept.items())


def test_the_size_of_a_graph():
    linear, hidden = nn.Linear(10, 30, bias=False), torch.randn(1, 7, 10)
    assert graph_bytes(linear, hidden) == 4 * (10 * 30 + 7 * 10)
    assert graph_bytes(lambda x: linear(x).tanh(), hidden) == 4 * (10 * 30 + 7 * 10 + 7 * 30)


def test_a_learner_is_let_go_before_the_next_one_is_made(chain):
    """Its moments are most of the memory where blocks find no room."""
    made, alive = chain(recomputed=True, resident=1), weakref.WeakSet()
    make = made.pool.make

    def counted(index: int) -> Learner:
        assert not alive
        learner = make(index)
        alive.add(learner)
        return learner

    made.pool.make = counted
    parts = Part.of(BATCH, 2)
    outputs = made.forward(parts)
    made.outputs(parts)
    for index in made.backward(parts, [torch.ones_like(output) for output in outputs]):
        made.pool[index].update()
    assert len(alive) == 1

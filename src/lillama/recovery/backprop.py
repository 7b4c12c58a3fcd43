"""Gradients through all blocks of a model with the parameters and the graph of one block in memory at a time.

A batch runs through the blocks from the first trained one to the last, then its gradient runs back. Between two blocks only
activations are kept; a block is run once more when the gradient comes back to it (gradient checkpointing, arXiv
1604.06174). Where memory allows, the graphs of all blocks are kept instead, which gives the same gradients sooner.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from lillama.distill.pool import LearnerPool
from lillama.stream.activations import ActivationStore
from lillama.stream.calls import BlockArgs, BlockInputs

RunBlock = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """A few sequences of a batch that are computed at once.

    Attributes:
        ids: which of the calibration sequences.
        place: which of the batch's.
    """

    ids: Tensor
    place: slice

    @classmethod
    def of(cls, batch: Int[Tensor, " n"], size: int) -> "list[Part]":
        """Cut a batch into parts of at most `size` sequences."""
        starts = range(0, len(batch), size)
        return [cls(batch[s : s + size], slice(s, min(s + size, len(batch)))) for s in starts]


@runtime_checkable
class Tape(Protocol):
    """Remembers a pass through the blocks, so that a gradient can go back."""

    def forward(self, index: int, part: Part, run: RunBlock, hidden: Float[Tensor, "sequences length width"]) -> Tensor:
        """Run a block and return its output, detached."""
        ...

    def backward(
        self, index: int, part: Part, run: RunBlock, gradient: Float[Tensor, "sequences length width"]
    ) -> Tensor:
        """Turn the gradient of a block's output into that of its input; parameters accumulate theirs."""
        ...


@dataclass(frozen=True)
class Recomputed:
    """Remembers the inputs of blocks.

    Attributes:
        inputs: block index -> store with a row for each sequence of a batch.
    """

    inputs: Mapping[int, ActivationStore]

    def forward(self, index: int, part: Part, run: RunBlock, hidden: Float[Tensor, "sequences length width"]) -> Tensor:
        """Run a block; its graph, with which it is computed as `KeptGraphs` does, is forgotten."""
        self.inputs[index].write(part.place, hidden)
        return _with_graph(run, hidden)[1].detach()

    def backward(
        self, index: int, part: Part, run: RunBlock, gradient: Float[Tensor, "sequences length width"]
    ) -> Tensor:
        """Run the block again, with a graph, and back."""
        return _back(*_with_graph(run, self.inputs[index].read(part.place)), gradient)


@dataclass(frozen=True)
class KeptGraphs:
    """Remembers the graphs of all blocks."""

    _ends: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def forward(self, index: int, part: Part, run: RunBlock, hidden: Float[Tensor, "sequences length width"]) -> Tensor:
        """Run a block with a graph."""
        ends = self._ends[index, part.place.start] = _with_graph(run, hidden)
        return ends[1].detach()

    def backward(
        self, index: int, part: Part, run: RunBlock, gradient: Float[Tensor, "sequences length width"]
    ) -> Tensor:
        """Go back through the graph, which is then forgotten."""
        return _back(*self._ends.pop((index, part.place.start)), gradient)


@dataclass(frozen=True)
class Chain:
    """The blocks of the compressed model that lie on the way from the first trained parameter to the head.

    Attributes:
        pool: the trained blocks.
        trained: their indices.
        dense: returns one of the other blocks, which stay as they are; gradients flow through them.
        blocks: indices of all, in order.
        calls: how blocks are called.
        inputs: what enters the first of them, for all calibration sequences.
        tape: how a pass is remembered.
    """

    pool: LearnerPool
    trained: frozenset[int]
    dense: Callable[[int], nn.Module]
    blocks: range
    calls: BlockInputs
    inputs: ActivationStore
    tape: Tape

    @torch.no_grad()
    def outputs(self, parts: Sequence[Part]) -> list[Tensor]:
        """Return the last block's outputs and remember nothing."""
        hidden = [self.inputs.read(part.ids) for part in parts]
        for index in self.blocks:
            hidden = self._through(index, parts, hidden)
        return hidden

    def forward(self, parts: Sequence[Part]) -> list[Tensor]:
        """Return the last block's outputs, detached, and remember the pass."""
        hidden = [self.inputs.read(part.ids) for part in parts]
        for index in self.blocks:
            self._forward(index, parts, hidden)
        return hidden

    def backward(self, parts: Sequence[Part], gradients: list[Tensor]) -> Iterator[int]:
        """Let the gradients of the last outputs run back; yield a trained block as soon as its own is complete."""
        for index in reversed(self.blocks):
            self._backward(index, parts, gradients)
            if index in self.trained:
                yield index

    # Each block is let go before the next one is read: hence a function call for every block.

    def _through(self, index: int, parts: Sequence[Part], hidden: list[Tensor]) -> list[Tensor]:
        block = self._block(index)
        return [block(self._call(index, part), x) for part, x in zip(parts, hidden, strict=True)]

    def _forward(self, index: int, parts: Sequence[Part], hidden: list[Tensor]) -> None:
        block = self._block(index)
        for place, part in enumerate(parts):
            hidden[place] = self.tape.forward(index, part, partial(block, self._call(index, part)), hidden[place])

    def _backward(self, index: int, parts: Sequence[Part], gradients: list[Tensor]) -> None:
        block = self._block(index)
        for place, part in enumerate(parts):
            run = partial(block, self._call(index, part))
            gradients[place] = self.tape.backward(index, part, run, gradients[place])

    def _block(self, index: int) -> Callable[[BlockArgs, Tensor], Tensor]:
        if index in self.trained:
            return self.pool[index].run
        block = self.dense(index)
        return lambda call, hidden: call(block, hidden)

    def _call(self, index: int, part: Part) -> BlockArgs:
        return self.calls.select(index, part.ids, self.inputs.device)


def graph_bytes(run: RunBlock, hidden: Float[Tensor, "sequences length width"]) -> int:
    """Return the memory that a block's graph holds, its parameters included, by building one."""
    sizes: dict[int, int] = {}

    def note(tensor: Shaped[Tensor, "..."]) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ends = _with_graph(run, hidden)
    del ends
    return sum(sizes.values())


def _with_graph(run: RunBlock, hidden: Float[Tensor, "sequences length width"]) -> tuple[Tensor, Tensor]:
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        return leaf, run(leaf)


def _back(
    leaf: Float[Tensor, "sequences length width"],
    end: Float[Tensor, "sequences length width"],
    gradient: Float[Tensor, "sequences length width"],
) -> Tensor:
    torch.autograd.backward(end, gradient)
    assert leaf.grad is not None
    return leaf.grad

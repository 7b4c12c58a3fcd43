"""A whole model run over many sequences, stack by stack and block by block."""

from collections.abc import Callable

from torch import nn

from lillama.stream.activations import ActivationStore
from lillama.stream.batch import Batch
from lillama.stream.calls import BlockInputs
from lillama.stream.capture import NewStore, advance, begin, overflow
from lillama.stream.model import StreamedModel

Visit = Callable[[int], None]


def through(
    model: StreamedModel,
    batch: Batch,
    new: NewStore,
    micro_batch: int,
    visit: Visit = lambda index: None,
    block: Callable[[int], nn.Module] | None = None,
    stacks: int | None = None,
    strict: bool = False,
) -> tuple[list[BlockInputs], list[ActivationStore]]:
    """Run a batch through the blocks of a model.

    Args:
        model: that is run.
        batch: what it is run on.
        new: returns a store for activations of a shape.
        micro_batch: sequences that are computed at once.
        visit: is told the index of each block before it runs.
        block: returns the block of an index; by default the model's own.
        stacks: how many of the stacks are run; by default all.
        strict: whether outputs that are not finite are refused.

    Returns:
        for each stack how its blocks are called, and the outputs of its last block.

    Raises:
        ModelError: the outputs of a block are not finite.
    """
    calls: list[BlockInputs] = []
    outputs: list[ActivationStore] = []
    for stack in range(len(model.stacks) if stacks is None else stacks):
        table, hidden = begin(model, batch, new, micro_batch, stack, dict(enumerate(outputs)))
        for index in model.indices(stack):
            visit(index)
            finite = advance((block or model.block)(index), index, table, hidden, hidden, micro_batch)
            if strict and not finite:
                raise overflow(f"the output of {model.names[index]}", model.dtype)
        calls.append(table)
        outputs.append(hidden)
    return calls, outputs

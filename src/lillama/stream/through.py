"""A whole model run over many sequences, stack by stack and block by block."""

from collections.abc import Callable

from torch import nn

from lillama.stream.batch import Batch
from lillama.stream.calls import CallTable
from lillama.stream.running import NewStore, advance, begin
from lillama.stream.store import ActivationStore
from lillama.stream.streamed import StreamedModel

Visit = Callable[[int], None]


def through(
    model: StreamedModel,
    batch: Batch,
    new: NewStore,
    micro_batch: int,
    visit: Visit = lambda index: None,
    block: Callable[[int], nn.Module] | None = None,
    stacks: int | None = None,
) -> tuple[list[CallTable], list[ActivationStore]]:
    """Run a batch through the blocks of a model.

    Args:
        model: that is run.
        batch: what it is run on.
        new: returns a store for activations of a shape.
        micro_batch: sequences that are computed at once.
        visit: is told the index of each block before it runs.
        block: returns the block of an index; by default the model's own.
        stacks: how many of the stacks are run; by default all.

    Returns:
        for each stack how its blocks are called, and the outputs of its last block.
    """
    calls: list[CallTable] = []
    outputs: list[ActivationStore] = []
    for stack in range(len(model.stacks) if stacks is None else stacks):
        table, hidden = begin(model, batch, new, micro_batch, stack, dict(enumerate(outputs)))
        for index in model.indices(stack):
            visit(index)
            advance((block or model.block)(index), index, table, hidden, hidden, micro_batch)
        calls.append(table)
        outputs.append(hidden)
    return calls, outputs

"""The probed sequences on their way through the original once more, when moments have to be computed again."""

from torch import nn

from lillama.stream.activations import ActivationPlacement, ActivationStore, StoreFactory
from lillama.stream.batch import Batch
from lillama.stream.calls import BlockInputs
from lillama.stream.capture import advance, begin
from lillama.stream.model import StreamedModel


class Probes:
    """Activations of the probed sequences before one block after the other.

    How a product rounds depends on the rows that are computed together. These sequences therefore run by themselves, in the
    micro-batches of their first pass, whose activations come out again bit for bit; their rows in a pass over all calibration
    sequences would not do.

    Args:
        model: the original.
        batch: the probed sequences.
        placement: where their activations go.
        micro_batch: sequences that are computed at once.
    """

    def __init__(self, model: StreamedModel, batch: Batch, placement: ActivationPlacement, micro_batch: int) -> None:
        self.model, self.batch, self.placement, self.micro_batch = model, batch, placement, micro_batch
        self._next, self._new = 0, self._stores()
        self._tables: list[BlockInputs] = []
        self._ends: list[ActivationStore] = []  # of each stack, its activations as far as they have come

    def before(self, index: int) -> ActivationStore:
        """Return the inputs of a block; the blocks below that were not run yet are read for it."""
        if index < self._next:
            self.remove()
        while self._next < index:
            self.advance(self.model.block(self._next))
        if self.model.stack_of(index) == len(self._ends):
            earlier = dict(enumerate(self._ends))
            table, first = begin(self.model, self.batch, self._new, self.micro_batch, len(self._ends), earlier)
            self._tables.append(table)
            self._ends.append(first)
        return self._ends[-1]

    def advance(self, block: nn.Module) -> None:
        """Run the block whose inputs were asked for last."""
        hidden = self.before(self._next)
        advance(block, self._next, self._tables[-1], hidden, hidden, self.micro_batch)
        self._next += 1

    def remove(self) -> None:
        """Give the activations back; the sequences stand before the first block again."""
        for store in (*self._new.made, *self._tables):
            store.remove()
        self._tables.clear()
        self._ends.clear()
        self._next, self._new = 0, self._stores()

    def _stores(self) -> StoreFactory:
        return StoreFactory(self.placement, self.model.dtype, "probes", len(self.model.stacks))

"""The two streams of activations that run through the model: the teacher's and the student's own."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from lillama.distill.block import BlockData
from lillama.distill.grams import Run
from lillama.stream.calls import CallTable
from lillama.stream.store import ActivationStore, Shelf
from lillama.stream.streamed import StreamedModel, advance, begin, row_slices


@dataclass
class Streams:
    """Activations of all calibration sequences before the block at work.

    Attributes:
        calls: how blocks are called.
        teacher: the teacher's activations.
        target: the teacher's activations after the block, once `teach` has run.
        student: the student's activations, or None while they equal the teacher's, or are not wanted.
        spare: a store that becomes the student's when the streams part; None if no student stream is wanted.
        mask: true at real tokens; None if all are.
        micro_batch: sequences that are computed at once.
    """

    calls: CallTable
    teacher: ActivationStore
    target: ActivationStore
    student: ActivationStore | None
    spare: ActivationStore | None
    mask: Bool[Tensor, "sequences length"] | None
    micro_batch: int

    @classmethod
    def begun(
        cls, model: StreamedModel, ids: Tensor, mask: Tensor | None, shelf: Shelf, both: bool, micro_batch: int
    ) -> "Streams":
        """Run the embeddings.

        Args:
            model: the teacher.
            ids: sequences x length.
            mask: true at real tokens, in the same shape; None if all are.
            shelf: where the activations go.
            both: whether a student's stream is wanted besides the teacher's.
            micro_batch: sequences that are computed at once.
        """
        shape = (*ids.shape, model.skeleton.config.get_text_config().hidden_size)
        names = ("teacher", "target", "student") if both else ("teacher", "target")
        place = shelf.place(len(names) * torch.Size(shape).numel() * model.dtype.itemsize)
        stores = [ActivationStore(shape, model.dtype, shelf, place, name) for name in names]
        calls = begin(model, ids, mask, stores[0], micro_batch)
        return cls(calls, stores[0], stores[1], None, stores[2] if both else None, mask, micro_batch)

    def teach(self, index: int, block: nn.Module) -> None:
        """Compute the teacher's outputs of a block."""
        advance(block, index, self.calls, self.teacher, self.target, self.micro_batch)

    def runs(self, index: int) -> Iterator[Run]:
        """Yield the teacher's inputs of a block by micro-batches, with the block's calls."""
        for rows in row_slices(self.teacher.shape[0], self.micro_batch):
            mask = None if self.mask is None else self.mask[rows]
            yield self.calls.select(index, rows, self.teacher.device), self.teacher.read(rows), mask

    def data(self, index: int, stream: str) -> BlockData:
        """Return the activations around a block, after `teach`."""
        return BlockData(
            index, self.calls, self.teacher, self.student, self.target, self.mask, stream, self.micro_batch
        )

    def move_on(self, index: int, student: nn.Module | None) -> None:
        """Step over a block: the teacher's outputs become the next inputs, and the student's stream goes through it.

        Args:
            index: of the block.
            student: what the student's stream goes through: the finished student, or for a block that stays dense the
                teacher if the streams have parted (see `parted`) and None if not.
        """
        if student is not None and self.spare is not None:
            source = self.student or self.teacher
            self.student = self.spare
            advance(student, index, self.calls, source, self.student, self.micro_batch)
        self.teacher, self.target = self.target, self.teacher

    @property
    def parted(self) -> bool:
        """Whether the student's activations differ from the teacher's by now."""
        return self.student is not None

    def remove(self) -> None:
        """Give the stores back."""
        for store in (self.teacher, self.target, self.spare):
            if store is not None:
                store.remove()

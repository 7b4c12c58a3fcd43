"""The activations before and behind the block at work, in two streams: the teacher's and the student's own."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lillama.distill.objective import record_outputs
from lillama.errors import RecipeError
from lillama.lowrank.gram import Gram
from lillama.moments.inputs import shrink_experts, watch_inputs, with_siblings
from lillama.stream.activations import ActivationPlacement, ActivationStore
from lillama.stream.batch import Batch
from lillama.stream.calls import BlockInputs
from lillama.stream.capture import advance, begin, row_slices
from lillama.stream.model import StreamedModel

Earlier = Mapping[int, tuple[ActivationStore, ActivationStore]]


@dataclass
class BlockActivations:
    """Activations of all calibration sequences before the block at work.

    Attributes:
        calls: how the blocks of the stack are called.
        teacher: the teacher's activations.
        target: the teacher's activations after the block, once `compute_target` has run.
        student: the student's activations, or None while they equal the teacher's, or are not wanted.
        spare: a store that becomes the student's when the streams part; None if no student stream is wanted.
        masks: true at real tokens; this stack's own first, then those of stacks that its blocks look at. None: all are real.
        micro_batch: sequences that are computed at once.
        own_calls: how the blocks are called in the student's stream, where that hangs on an earlier stack; None if alike.
        before: outputs of the earlier stacks: the teacher's and the student's, the same while these have not parted.
        own_target: what the student's stream is compared with, once `blend_target` has run; None if that is `target`.
        next_target: the teacher's activations after the next block, once `compute_next_target` has run.
        parts: child of the block -> the teacher's outputs of it, once `compute_target` was asked for them.
    """

    calls: BlockInputs
    teacher: ActivationStore
    target: ActivationStore
    student: ActivationStore | None
    spare: ActivationStore | None
    masks: tuple[Bool[Tensor, "sequences _"] | None, ...]
    micro_batch: int
    own_calls: BlockInputs | None = None
    before: Earlier = field(default_factory=dict)
    own_target: ActivationStore | None = None
    next_target: ActivationStore | None = None
    parts: dict[str, ActivationStore] = field(default_factory=dict)
    _made: dict[str, ActivationStore] = field(default_factory=dict)

    @classmethod
    def at(
        cls,
        stack: int,
        model: StreamedModel,
        batch: Batch,
        placement: ActivationPlacement,
        both: bool,
        micro_batch: int,
        further: int = 0,
        before: Earlier | None = None,
    ) -> "BlockActivations":
        """Run what comes before the first block of a stack.

        Args:
            stack: index of the stack.
            model: the teacher.
            batch: what it is run on.
            placement: where the activations go.
            both: whether a student's stream is wanted besides the teacher's.
            micro_batch: sequences that are computed at once.
            further: stores that `compute_target`, `blend_target` and `compute_next_target` will need.
            before: for each earlier stack, its outputs in the teacher's and in the student's stream.
        """
        before = before or {}
        names = ("teacher", "target", "student") if both else ("teacher", "target")
        stores: list[ActivationStore] = []

        def new(shape: tuple[int, ...]) -> ActivationStore:
            place = placement.place((len(names) + further) * torch.Size(shape).numel() * model.dtype.itemsize)
            stores.extend(
                ActivationStore(shape, model.dtype, placement, place, f"{name}{stack or ''}") for name in names
            )
            return stores[0]

        calls, _ = begin(model, batch, new, micro_batch, stack, {s: pair[0] for s, pair in before.items()})
        spare = stores[2] if both else None
        activations = cls(calls, stores[0], stores[1], None, spare, batch.masks_at(stack), micro_batch, before=before)
        if spare is not None and any(pair[0] is not pair[1] for pair in before.values()):
            own = {s: pair[1] for s, pair in before.items()}
            activations.own_calls, activations.student = begin(
                model, batch, lambda shape: spare, micro_batch, stack, own
            )
        return activations

    def enter_stack(
        self, model: StreamedModel, batch: Batch, placement: ActivationPlacement, stack: int, further: int = 0
    ) -> "BlockActivations":
        """Return the activations before the first block of the next stack; the outputs of this one are kept for it."""
        before = dict(self.before) | {stack - 1: (self.teacher, self.student or self.teacher)}
        kept = {id(store) for store in before[stack - 1]}
        for store in (self.teacher, self.target, self.spare, *self._made.values(), self.calls, self.own_calls):
            if store is not None and id(store) not in kept:
                store.remove()
        both = self.spare is not None
        return BlockActivations.at(stack, model, batch, placement, both, self.micro_batch, further, before)

    @torch.no_grad()
    def compute_target(
        self, index: int, block: nn.Module, parts: Sequence[str] = (), linears: Iterable[str] = ()
    ) -> dict[str, Gram]:
        """Compute the teacher's outputs of a block, and of those of its children that are named.

        Args:
            index: of the block.
            block: the teacher's.
            parts: children whose outputs are wanted.
            linears: whose inputs' Grams are wanted.

        Returns:
            linear -> Gram of its inputs.

        Raises:
            RecipeError: a child's outputs cannot be compared.
        """
        linears = list(linears)
        with watch_inputs(block, with_siblings(block, linears)) as watch, record_outputs(block, parts) as outputs:
            for rows in row_slices(self.teacher.shape[0], self.micro_batch):
                hidden = self.teacher.read(rows)
                call = self.calls.select(index, rows, self.teacher.device)
                self.target.write(rows, watch.call(call, block, hidden))
                watch.add(*(None if mask is None else mask[rows] for mask in self.masks))
                self.parts = {name: self._part(name, outputs.get(name), len(hidden)) for name in parts}
                for name, store in self.parts.items():
                    store.write(rows, outputs[name].reshape(*hidden.shape[:2], -1))
        return shrink_experts(block, watch.grams, linears)

    @torch.no_grad()
    def blend_target(self, index: int, block: nn.Module, share: float) -> None:
        """Move the student's target by a share towards the teacher's answer to the student's own input."""
        if self.student is None or not share:
            return
        self.own_target = self._store("adapted", self.target.shape)
        for rows in row_slices(self.target.shape[0], self.micro_batch):
            call = (self.own_calls or self.calls).select(index, rows, self.target.device)
            answer = call(block, self.student.read(rows))
            self.own_target.write(rows, torch.lerp(self.target.read(rows), answer, share))

    def compute_next_target(self, index: int, next_block: nn.Module) -> None:
        """Compute the teacher's outputs of the block behind block `index` too."""
        self.next_target = self._store("ahead", self.target.shape)
        advance(next_block, index + 1, self.calls, self.target, self.next_target, self.micro_batch)

    def advance(self, index: int, student: nn.Module | None) -> None:
        """Step over a block: the teacher's outputs become the next inputs, and the student's stream goes through it.

        Args:
            index: of the block.
            student: what the student's stream goes through: the finished student, or for a block that stays dense the
                teacher if the streams have parted (see `parted`) and None if not.
        """
        if student is not None and self.spare is not None:
            source = self.student or self.teacher
            self.student = self.spare
            advance(student, index, self.own_calls or self.calls, source, self.student, self.micro_batch)
        self.teacher, self.target = self.target, self.teacher
        self.own_target, self.next_target, self.parts = None, None, {}

    @property
    def mask(self) -> Bool[Tensor, "sequences _"] | None:
        """True at this stack's real tokens; None if all are."""
        return self.masks[0]

    @property
    def parted(self) -> bool:
        """Whether the student's activations differ from the teacher's by now."""
        return self.student is not None

    def remove(self, earlier: bool = True) -> None:
        """Give the stores back, those of earlier stacks too unless somebody still needs them."""
        before = (store for pair in self.before.values() for store in pair) if earlier else ()
        for store in (self.teacher, self.target, self.spare, *self._made.values(), *before, self.calls, self.own_calls):
            if store is not None:
                store.remove()

    def _store(self, name: str, shape: tuple[int, ...]) -> ActivationStore:
        """Return a store that was used for an earlier block, or a new one."""
        if name not in self._made or self._made[name].shape != shape:
            self._made[name] = ActivationStore(shape, self.target.dtype, self.target.placement, self.target.place, name)
        return self._made[name]

    def _part(self, name: str, output: Float[Tensor, "*_ width"] | None, rows: int) -> ActivationStore:
        """Return the store for the outputs of a child, whose output for some sequences is given."""
        sequences, length, _ = self.target.shape
        if output is None or output.numel() % (rows * length):
            found = "is not called as a module" if output is None else f"returns {tuple(output.shape)}"
            raise RecipeError(
                f"distill.sub_blocks: {name} of the block {found}, which is no activation of {length} tokens; set "
                "distill.sub_blocks to 0"
            )
        return self._store(f"part-{name}", (sequences, length, output.numel() // (rows * length)))

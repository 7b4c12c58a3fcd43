"""Local distillation of one block, from its initialisation to its best state."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lillama.distill.activations import BlockActivations
from lillama.distill.history import History, Measurement
from lillama.distill.learner import Learner
from lillama.distill.log import DistillLog
from lillama.distill.losses import Loss
from lillama.distill.objective import LookAhead, LossScale, MicroBatch, real_tokens
from lillama.distill.pool import LearnerPool
from lillama.distill.spectrum import largest_singular_values
from lillama.distill.trainer import Trainer, TrainingState
from lillama.errors import TrainingError
from lillama.system.progress import Report

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockData:
    """The activations around one block, as long as they are not advanced behind it.

    Attributes:
        activations: before the block, and the targets.
        index: of the block.
        stream: as in `DistillConfig`.
        next_block: the teacher's next block, frozen, if the student is looked at through it.
    """

    activations: BlockActivations
    index: int
    stream: str
    next_block: nn.Module | None = None

    def micro_batches(self, rows: Int[Tensor, " n"]) -> Iterator[MicroBatch]:
        """Read some sequences, a micro-batch at a time."""
        activations, device = self.activations, self.activations.target.device
        for part in rows.split(activations.micro_batch):
            inputs = {}
            if self.stream != "student" or activations.student is None:
                inputs["teacher"] = activations.teacher.read(part)
            if self.stream != "teacher" and activations.student is not None:
                inputs["student"] = activations.student.read(part)
            yield MicroBatch(
                call=activations.calls.select(self.index, part, device),
                inputs=inputs,
                target=activations.target.read(part),
                mask=None if activations.mask is None else activations.mask[part].to(device, non_blocking=True),
                tokens=self.tokens(part),
                own_target=None if activations.own_target is None else activations.own_target.read(part),
                parts={name: store.read(part) for name, store in activations.parts.items()},
                ahead=self._look_ahead(part),
                own_call=None
                if activations.own_calls is None
                else activations.own_calls.select(self.index, part, device),
            )

    def tokens(self, rows: Int[Tensor, " n"]) -> int:
        """Return the number of real tokens in some sequences."""
        return real_tokens(self.activations.mask, rows, self.activations.target.shape[1])

    def loss_scale(self, loss: Loss, rows: Int[Tensor, " n"]) -> LossScale:
        """Return the normalisers of a loss, measured on the real tokens of some sequences of the targets."""
        return LossScale.of(loss, self.micro_batches(rows))

    def _look_ahead(self, rows: Int[Tensor, " n"]) -> LookAhead | None:
        activations = self.activations
        if self.next_block is None:
            return None
        assert activations.next_target is not None  # it was computed with this block
        calls = (
            activations.calls if activations.own_calls is None or self.stream == "teacher" else activations.own_calls
        )
        call = calls.select(self.index + 1, rows, activations.target.device)
        return LookAhead(self.next_block, call, activations.next_target.read(rows))


@dataclass(frozen=True)
class BlockTraining:
    """One block that learns by itself.

    Attributes:
        name: of the block.
        pool: with its learner alone.
        data: activations activations the block.
        held_out: sequences on which states are compared.
    """

    name: str
    pool: LearnerPool
    data: BlockData
    held_out: Int[Tensor, " m"]
    keeps_start: ClassVar[bool] = True

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """The one history, of the one block."""
        return {self.name: (self.data.index,)}

    def step(self, batch: Int[Tensor, " n"], histories: Mapping[str, History]) -> Float[Tensor, ""]:
        """Take a step; return its loss, summed over the streams."""
        tokens = self.data.tokens(batch)
        losses = self.pool[self.data.index].step(self.data.micro_batches(batch), tokens)
        histories[self.name].note(losses, tokens)
        return torch.stack(list(losses.values())).sum()

    def measure(self, histories: Mapping[str, History]) -> dict[str, Measurement]:
        """Measure the loss on the held-out sequences."""
        losses = self.pool[self.data.index].validate(self.data.micro_batches(self.held_out))
        return {self.name: Measurement(losses, sum(losses.values()))}

    def review(self, state: TrainingState) -> None:
        """End the training if a loss is not finite.

        Raises:
            TrainingError: the loss is not finite at the start.
        """
        if not state.done:
            note_start(self.pool, self.groups, state.histories)
        elif state.histories[self.name].first_bad_step() is not None:
            state.stopped = "not finite"


def distill_block(
    learner: Learner,
    name: str,
    data: BlockData,
    held_out: Int[Tensor, " m"],
    trainer: Trainer,
    report: Report,
    retried: bool = False,
) -> DistillLog:
    """Train a student block and leave it in the state that was best on the held-out sequences.

    Where a loss is not finite, training begins once more from the best state, at half the rate.

    Args:
        learner: holds the student with its initial weights.
        name: of the block, for messages.
        data: activations activations the block.
        held_out: sequences on which states are compared.
        trainer: the loop; each attempt has its snapshots in a folder of its own in the trainer's.
        report: told about the steps.
        retried: whether this is the second attempt.

    Raises:
        TrainingError: the loss was not finite at half the learning rate either.
    """
    pool = LearnerPool(lambda index: learner, trainer.folder, 1)
    attempt = replace(trainer, folder=trainer.folder / ("second" if retried else "first"), detail=name)
    state = attempt.fit(BlockTraining(name, pool, data, held_out), report)
    history = state.histories[name]
    history.retried = retried
    learner.restore(history.best_states[data.index])
    if state.stopped:
        again = with_half_lr(learner, name, history)
        return distill_block(again, name, data, held_out, trainer, report, retried=True)
    return DistillLog.of(name, learner.lr, history, largest_singular_values(learner.student))


def with_half_lr(learner: Learner, name: str, history: History) -> Learner:
    """Return a fresh learner at half the rate for a student whose loss was not finite.

    Raises:
        TrainingError: this happened before.
    """
    bad = history.first_bad_step()
    if history.retried:
        raise TrainingError(
            f"{name}: the loss is not finite at step {bad}, at half the learning rate too ({learner.lr:g}); "
            "lower distill.lr in the recipe"
        )
    logger.warning("%s: loss not finite at step %d; once more at half the learning rate", name, bad)
    return learner.with_lr(learner.lr / 2)


def note_start(pool: LearnerPool, groups: Mapping[str, tuple[int, ...]], histories: Mapping[str, History]) -> None:
    """Note the largest singular values of the blocks before training.

    Raises:
        TrainingError: a loss is not finite at the start.
    """
    for name, history in histories.items():
        if not history.best_states:
            raise TrainingError(f"{name}: the loss is not finite at step 0; the original model overflows on this text")
    for name, history in histories.items():
        for index in groups[name]:
            history.singular |= largest_singular_values(pool[index].student)

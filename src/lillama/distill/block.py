"""Local distillation of one block, from its initialisation to its best state."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lillama.distill.config import DistillConfig
from lillama.distill.learner import Learner
from lillama.distill.losses import Loss
from lillama.distill.objective import Ahead, MicroBatch, Units, real_tokens
from lillama.distill.spectrum import largest_singular_values
from lillama.distill.trace import DistillLog, Trace
from lillama.errors import TrainingError
from lillama.progress import Progress, Report
from lillama.stream.calls import BlockInputs
from lillama.stream.store import ActivationStore

logger = logging.getLogger(__name__)

CHECKS = 4  # at least this often is the held-out loss measured in one training
REPORT_SECONDS = 0.2


@dataclass(frozen=True)
class Rows:
    """Which calibration sequences are trained on, and which are held out.

    Attributes:
        train: indices of the sequences that are trained on.
        held_out: indices of those on which states are compared.
    """

    train: Int[Tensor, " n"]
    held_out: Int[Tensor, " m"]

    @classmethod
    def split(cls, total: int, share: float, seed: int) -> "Rows":
        """Hold out a random share of `total` sequences, at least one and not all; a single sequence serves for both."""
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        if total == 1:
            return cls(order, order)
        count = min(max(1, round(share * total)), total - 1)
        return cls(order[count:].sort().values, order[:count].sort().values)

    def epoch(self, seed: int, epoch: int, batch_size: int) -> list[Tensor]:
        """Return the batches of one epoch, shuffled anew; the last may be smaller."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        return list(self.train[order].split(batch_size))


@dataclass(frozen=True)
class NextBlock:
    """The block behind the one that is taught.

    Attributes:
        index: of it.
        block: the teacher's, frozen.
        target: the teacher's outputs of it.
    """

    index: int
    block: nn.Module
    target: ActivationStore


@dataclass(frozen=True)
class BlockData:
    """The activations around one block.

    Attributes:
        index: of the block.
        calls: how blocks are called.
        teacher: the teacher's inputs of the block.
        student: the student's inputs, or None while they are the teacher's.
        target: the teacher's outputs.
        mask: true at real tokens, on the host; None if all are.
        stream: as in `DistillConfig`.
        micro_batch: sequences that are computed at once.
        own_target: what the student's stream is compared with, if it is not `target`.
        parts: child of the block -> the teacher's outputs of that child.
        following: the next block, if the student is looked at through it.
        own_calls: how blocks are called in the student's stream; None if as in the teacher's.
    """

    index: int
    calls: BlockInputs
    teacher: ActivationStore
    student: ActivationStore | None
    target: ActivationStore
    mask: Bool[Tensor, "sequences length"] | None
    stream: str
    micro_batch: int
    own_target: ActivationStore | None = None
    parts: Mapping[str, ActivationStore] = field(default_factory=dict)
    following: NextBlock | None = None
    own_calls: BlockInputs | None = None

    def micro_batches(self, rows: Int[Tensor, " n"]) -> Iterator[MicroBatch]:
        """Read some sequences, a micro-batch at a time."""
        for part in rows.split(self.micro_batch):
            inputs = {}
            if self.stream != "student" or self.student is None:
                inputs["teacher"] = self.teacher.read(part)
            if self.stream != "teacher" and self.student is not None:
                inputs["student"] = self.student.read(part)
            yield MicroBatch(
                call=self.calls.select(self.index, part, self.target.device),
                inputs=inputs,
                target=self.target.read(part),
                mask=None if self.mask is None else self.mask[part].to(self.target.device, non_blocking=True),
                tokens=self.tokens(part),
                own_target=None if self.own_target is None else self.own_target.read(part),
                parts={name: store.read(part) for name, store in self.parts.items()},
                ahead=self._ahead(part),
                own_call=None
                if self.own_calls is None
                else self.own_calls.select(self.index, part, self.target.device),
            )

    def tokens(self, rows: Int[Tensor, " n"]) -> int:
        """Return the number of real tokens in some sequences."""
        return real_tokens(self.mask, rows, self.target.shape[1])

    def units(self, loss: Loss, rows: Int[Tensor, " n"]) -> Units:
        """Return the units of a loss, measured on the real tokens of some sequences of the targets."""
        return Units.measured(loss, self.micro_batches(rows))

    def _ahead(self, rows: Int[Tensor, " n"]) -> Ahead | None:
        if self.following is None:
            return None
        calls = self.calls if self.own_calls is None or self.stream == "teacher" else self.own_calls
        call = calls.select(self.following.index, rows, self.target.device)
        return Ahead(self.following.block, call, self.following.target.read(rows))


def distill_block(
    learner: Learner, name: str, data: BlockData, rows: Rows, seed: int, report: Report, retried: bool = False
) -> DistillLog:
    """Train a student block and leave it in the state that was best on the held-out sequences.

    Args:
        learner: holds the student with its initial weights.
        name: of the block, for messages.
        data: activations around the block.
        rows: training and held-out sequences.
        seed: of the order of the batches.
        report: told about the steps.
        retried: whether this is the second attempt, at half the rate.

    Raises:
        TrainingError: the loss was not finite at half the learning rate either.
    """
    config, steps, tokens, told = learner.config, learner.steps, 0, 0.0
    trace = Trace()
    trace.check(0, learner.validate(data.micro_batches(rows.held_out)), learner.state)
    if not trace.best_state:
        raise TrainingError(f"{name}: the loss is not finite at step 0; the original model overflows on this text")
    trace.singular = largest_singular_values(learner.student)
    for batch in batches(rows, config, seed):
        count = data.tokens(batch)
        tokens += count
        trace.losses.append(learner.step(data.micro_batches(batch), count))
        step = learner.step_count
        if time.monotonic() - told > REPORT_SECONDS or step == steps:
            told = time.monotonic()
            report(Progress("steps", step, steps, name, tokens, trace.recent_loss()))
        if step in check_steps(config, steps):
            trace.check(step, learner.validate(data.micro_batches(rows.held_out)), learner.state)
            bad = trace.first_bad_step()
            if bad is not None:
                learner.restore(trace.best_state)
                return distill_block(retry(learner, name, bad, retried), name, data, rows, seed, report, retried=True)
    learner.restore(trace.best_state)
    return trace.log(name, learner.lr, tokens, retried, largest_singular_values(learner.student))


def retry(learner: Learner, name: str, bad_step: int, retried: bool) -> Learner:
    """Return a fresh learner at half the rate for a student whose loss was not finite.

    Raises:
        TrainingError: this happened before.
    """
    if retried:
        raise TrainingError(
            f"{name}: the loss is not finite at step {bad_step}, at half the learning rate too ({learner.lr:g}); "
            "lower distill.lr in the recipe"
        )
    logger.warning("%s: loss not finite at step %d; once more at half the learning rate", name, bad_step)
    return learner.halved()


def check_steps(config: DistillConfig, steps: int) -> set[int]:
    """Return the steps after which the held-out loss is measured: after each epoch, and at least four times."""
    checks = max(CHECKS, config.epochs)
    return {math.ceil(steps * k / checks) for k in range(1, checks + 1)}


def batches(rows: Rows, config: DistillConfig, seed: int) -> Iterator[Tensor]:
    """Yield the training sequences of every optimiser step."""
    for epoch in range(config.epochs):
        yield from rows.epoch(seed, epoch, config.batch_size)


def step_total(rows: Rows, config: DistillConfig) -> int:
    """Return the optimiser steps of one block's training."""
    return config.epochs * math.ceil(len(rows.train) / config.batch_size)

"""The joint schedule: every batch runs through all blocks, and each student takes a step on it (arXiv 2412.16719).

Blocks need not fit in memory together: learners that find no room wait in files between their steps.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lillama.distill.block import note_start, with_half_lr
from lillama.distill.config import DistillConfig
from lillama.distill.history import History, Measurement
from lillama.distill.learner import Learner
from lillama.distill.log import DistillLog
from lillama.distill.objective import MicroBatch, real_tokens
from lillama.distill.pool import LearnerPool
from lillama.distill.spectrum import largest_singular_values
from lillama.distill.trainer import Trainer, TrainingState
from lillama.stream.activations import ActivationStore
from lillama.stream.calls import BlockArgs, BlockInputs
from lillama.system.progress import Report


@dataclass(frozen=True)
class JointData:
    """What all blocks are taught on.

    Attributes:
        calls: how blocks are called.
        hidden: inputs of the first block.
        mask: true at real tokens; None if all are.
        micro_batch: sequences that are computed at once.
        own_calls: how blocks are called in the student's stream; None if alike.
        own_hidden: what enters the first block there; None if the same.
    """

    calls: BlockInputs
    hidden: ActivationStore
    mask: Bool[Tensor, "sequences length"] | None
    micro_batch: int
    own_calls: BlockInputs | None = None
    own_hidden: ActivationStore | None = None


@dataclass(frozen=True)
class JointTraining:
    """All blocks of a stack, each of which takes a step on every batch.

    Attributes:
        names: index -> name of the blocks that are trained.
        last: index of the last of them; blocks above it need not run.
        teacher: returns the teacher's block of an index.
        pool: the learners.
        data: what they are taught on.
        held_out: sequences on which states are compared.
        config: of the distillation.
    """

    names: Mapping[int, str]
    last: int
    teacher: Callable[[int], nn.Module]
    pool: LearnerPool
    data: JointData
    held_out: Int[Tensor, " m"]
    config: DistillConfig
    keeps_start: ClassVar[bool] = True

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """A history for each block."""
        return {name: (index,) for index, name in self.names.items()}

    def step(self, batch: Int[Tensor, " n"], histories: Mapping[str, History]) -> Float[Tensor, ""]:
        """Let every block take one step on a batch; return the mean of their losses."""
        totals = list[Tensor]()
        for index, micro_batches in self._through(batch):
            tokens = sum(micro.tokens for micro in micro_batches)
            losses = self.pool[index].step(micro_batches, tokens)
            histories[self.names[index]].note(losses, tokens)
            totals.append(torch.stack(list(losses.values())).sum())
        return torch.stack(totals).mean()

    def measure(self, histories: Mapping[str, History]) -> dict[str, Measurement]:
        """Measure the held-out loss of every block."""
        sums = {index: (0, dict[str, float]()) for index in self.names}
        for part in self.held_out.split(self.config.batch_size):
            for index, micro_batches in self._through(part):
                count = sum(micro.tokens for micro in micro_batches)
                tokens, losses = sums[index]
                means = self.pool[index].validate(micro_batches)
                sums[index] = tokens + count, {s: losses.get(s, 0.0) + mean * count for s, mean in means.items()}
        found = dict[str, Measurement]()
        for index, (tokens, losses) in sums.items():
            means = {stream: loss / tokens for stream, loss in losses.items()}
            found[self.names[index]] = Measurement(means, sum(means.values()))
        return found

    def review(self, state: TrainingState) -> None:
        """Send blocks whose loss was not finite back to their best state, at half the rate for the rest of the steps.

        Raises:
            TrainingError: a loss is not finite at the start, or at half the learning rate either.
        """
        if not state.done:
            note_start(self.pool, self.groups, state.histories)
            return
        for index, name in self.names.items():
            history = state.histories[name]
            if history.first_bad_step() is None:
                continue
            learner = self.pool[index]
            learner.restore(history.best_states[index])
            again = with_half_lr(learner, name, history)
            again.step_count = learner.step_count
            self.pool.replace(index, again)
            history.forget_bad()
            history.retried = True

    def _through(self, batch: Int[Tensor, " n"]) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Take a batch from block to block; yield those of the trained ones, and go on with what they are then."""
        parts = batch.split(self.data.micro_batch)
        teacher = [self.data.hidden.read(part) for part in parts]
        own, device = self.data.own_hidden, self.data.hidden.device
        student, parted = list(teacher) if own is None else [own.read(part) for part in parts], own is not None
        for index in range(self.data.calls.first, self.last + 1):
            block = self.teacher(index)
            calls = [self.data.calls.select(index, part, device) for part in parts]
            own_calls = calls
            if self.data.own_calls is not None:
                own_calls = [self.data.own_calls.select(index, part, device) for part in parts]
            with torch.no_grad():
                targets = [call(block, x) for call, x in zip(calls, teacher, strict=True)]
            if index in self.names:
                yield (
                    index,
                    [
                        self._micro_batch((call, own_call), block, x, own if parted else None, y, part)
                        for call, own_call, x, own, y, part in zip(
                            calls, own_calls, teacher, student, targets, parts, strict=True
                        )
                    ],
                )
                if index < self.last and self.config.stream != "teacher":
                    through = self.pool[index].forward
                    student = [through(call, own) for call, own in zip(own_calls, student, strict=True)]
                    del through  # the learner finds its way to a file before the next one is read
                    parted = True
            elif parted:
                with torch.no_grad():
                    student = [call(block, own) for call, own in zip(own_calls, student, strict=True)]
            if not parted:
                student = targets
            teacher = targets

    @torch.no_grad()
    def _micro_batch(
        self,
        calls: tuple[BlockArgs, BlockArgs],
        block: nn.Module,
        teacher: Float[Tensor, "sequences length width"],
        student: Float[Tensor, "sequences length width"] | None,
        target: Float[Tensor, "sequences length width"],
        part: Int[Tensor, " sequences"],
    ) -> MicroBatch:
        config, mask = self.config, self.data.mask
        inputs = {"teacher": teacher} if config.stream != "student" or student is None else {}
        own_target = None
        if config.stream != "teacher" and student is not None:
            inputs["student"] = student
            own_target = torch.lerp(target, calls[1](block, student), config.adaptive) if config.adaptive else None
        here = None if mask is None else mask[part].to(target.device, non_blocking=True)
        tokens = real_tokens(mask, part, target.shape[1])
        return MicroBatch(calls[0], inputs, target, here, tokens, own_target, own_call=calls[1])


def distill_stack(
    training: JointTraining, trainer: Trainer, report: Report
) -> Iterator[tuple[int, Learner, DistillLog]]:
    """Train all blocks of a stack, then yield each one's index, its learner in its best state, and its log.

    Raises:
        TrainingError: a loss was not finite at half the learning rate either.
    """
    state = trainer.fit(training, report)
    for index, name in training.names.items():
        learner, history = training.pool[index], state.histories[name]
        learner.restore(history.best_states[index])
        singular = largest_singular_values(learner.student)
        yield index, learner, DistillLog.of(name, learner.lr, history, singular)

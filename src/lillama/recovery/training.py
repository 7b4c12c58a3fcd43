"""Recovery: all compressed blocks learn together to give the original's predictions.

The gradient of each block is clipped by its own norm and the block steps as soon as its gradient is complete, so that no two
blocks need their gradients at once.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lillama.distill.history import History, Measurement
from lillama.distill.learner import Learner
from lillama.distill.pool import LearnerPool
from lillama.distill.rate import measure_lr
from lillama.distill.split import Split
from lillama.distill.trainer import TrainingState
from lillama.recovery.backprop import Chain, Part
from lillama.recovery.config import RecoveryConfig
from lillama.recovery.log import HeldOut
from lillama.stream.activations import ActivationStore
from lillama.stream.batch import Batch
from lillama.stream.head import Compared, Head

logger = logging.getLogger(__name__)

ALL = "all blocks"
WORSE = 1.01  # times the best held-out loss so far: the rate is too high


@dataclass(frozen=True)
class RecoveryData:
    """What the blocks learn from.

    Attributes:
        batch: all calibration sequences.
        targets: the original's last outputs for them.
        split: training and held-out sequences.
        micro_batch: sequences that are computed at once.
    """

    batch: Batch
    targets: ActivationStore
    split: Split
    micro_batch: int


@dataclass(frozen=True)
class RecoveryTraining:
    """All compressed blocks, end to end; they have one loss and one best state.

    Attributes:
        chain: the blocks.
        head: what comes after them.
        data: what they learn from.
        config: of the recovery.
    """

    chain: Chain
    head: Head
    data: RecoveryData
    config: RecoveryConfig
    keeps_start: ClassVar[bool] = False  # nothing is written where no state was better

    @property
    def pool(self) -> LearnerPool:
        """The blocks under training."""
        return self.chain.pool

    @property
    def groups(self) -> dict[str, tuple[int, ...]]:
        """One history of all of them."""
        return {ALL: tuple(index for index in self.chain.blocks if index in self.chain.trained)}

    def step(self, batch: Int[Tensor, " n"], histories: Mapping[str, History]) -> Float[Tensor, ""]:
        """Let every block take one step on a batch; return the mean loss.

        Gradients are of sums over tokens, so that those of half-precision activations do not underflow; the masters' are
        divided by the number of tokens.
        """
        tokens, predicted = self._counts(batch)
        sums = self._backward(batch, lambda learner: _update(learner, tokens))
        kl, lm = sums / torch.tensor([tokens, predicted], device=sums.device)
        histories[ALL].note({"kl": kl, "lm": lm}, tokens)
        return (1 - self.config.lm) * kl + self.config.lm * lm

    def _backward(self, batch: Int[Tensor, " n"], then: Callable[[Learner], None]) -> Float[Tensor, "2"]:
        """Compute the gradients of a batch, block by block; return the sums of both losses over it."""
        parts = Part.of(batch, self.data.micro_batch)
        tokens, predicted = self._counts(batch)
        weights = 1 - self.config.lm, self.config.lm * tokens / predicted
        sums, gradients = torch.zeros(2, device=self.chain.inputs.device), list[Tensor]()
        for part, own in zip(parts, self.chain.forward(parts), strict=True):
            found = self._compared(part, own, self.data.targets.read(part.ids), weights)
            assert found.gradient is not None
            sums += found.sums
            gradients.append(found.gradient)
        for index in self.chain.backward(parts, gradients):
            then(self.pool[index])
        return sums

    def time_step(self) -> tuple[float, float]:
        """Return the seconds of an optimiser step and of a check on the held-out sequences, by the second of two of each."""
        batch, rows = self.data.split.train[: self.config.batch_size], self.data.split.held_out
        part, seconds = rows[: self.config.batch_size], dict[str, float]()
        for _ in range(2):
            begun = time.monotonic()
            self._backward(batch, lambda learner: learner.optimiser.zero_grad())
            seconds["step"] = time.monotonic() - begun
            begun = time.monotonic()
            self._held_out(part)
            seconds["check"] = (time.monotonic() - begun) * len(rows) / len(part)
        return seconds["step"], seconds["check"]

    def _find_lr(self) -> None:
        """Set every block's rate by the held-out loss after a first step on one batch; no parameter changes."""
        self._backward(self.data.split.train[: self.config.batch_size], Learner.aim)
        indices, rows, gone = self.groups[ALL], self.data.split.held_out[: self.config.batch_size], 0.0

        def loss_at(lr: float) -> float:
            nonlocal gone
            for index in indices:
                self.pool[index].move(lr - gone)
            gone = lr
            return self._held_out(rows).loss(self.config.lm)

        guess = self.pool[indices[0]].lr
        lr = measure_lr(loss_at, self._held_out(rows).loss(self.config.lm), guess)
        for index in indices:
            learner = self.pool[index]
            learner.restore(self.pool.make(index).state())
            self.pool.replace(index, learner.with_lr(lr))
        logger.info("recovery: learning rate %.2g by the loss after a first step", lr)

    def measure(self, histories: Mapping[str, History]) -> dict[str, Measurement]:
        """Measure the blocks as they are now on the held-out sequences."""
        found = self._held_out(self.data.split.held_out)
        return {ALL: measurement(found, histories[ALL], self.config)}

    def _held_out(self, rows: Int[Tensor, " n"]) -> HeldOut:
        sums, lengths = torch.zeros(2), 0.0
        for batch in rows.split(self.config.batch_size):
            parts = Part.of(batch, self.data.micro_batch)
            for part, own in zip(parts, self.chain.outputs(parts), strict=True):
                teacher = self.data.targets.read(part.ids)
                sums += self._compared(part, own, teacher, None).sums.cpu()
                ratio = own.float().norm(dim=-1) / teacher.float().norm(dim=-1)
                mask = self.data.batch[part.ids].masks.get(len(self.head.model.stacks) - 1)
                lengths += (ratio if mask is None else ratio[mask.to(ratio.device)]).sum().item()
        tokens, predicted = self._counts(rows)
        return HeldOut(sums[0].item() / tokens, sums[1].item() / predicted, lengths / tokens)

    def review(self, state: TrainingState) -> None:
        """Go back to the best state at half the rate where the loss rose; end the training where it brings nothing more."""
        history = state.histories[ALL]
        if not state.done and history.first_bad_step() is not None:
            state.stopped = "not finite"
        elif not state.done:
            if self.config.lr is None:
                self._find_lr()
        elif rises(history, self.config):
            self._go_back(history)
            history.halved.append(state.done)
        elif history.best_step and history.checks_since_best >= self.config.patience:
            state.stopped = "no progress"

    def _go_back(self, history: History) -> None:
        """Put every block into its best state, or that of the start, with fresh moments and half the rate."""
        for index in self.groups[ALL]:
            learner = self.pool[index]
            learner.restore(history.best_states[index] if history.best_states else self.pool.make(index).state())
            again = learner.with_lr(learner.lr / 2)
            again.step_count = learner.step_count
            self.pool.replace(index, again)
        history.forget_bad()

    def _compared(
        self,
        part: Part,
        own: Float[Tensor, "sequences length width"],
        teacher: Float[Tensor, "sequences length width"],
        weights: tuple[float, float] | None,
    ) -> Compared:
        return self.head.compare(self.data.batch[part.ids], own, teacher, weights)

    def _counts(self, rows: Int[Tensor, " n"]) -> tuple[int, int]:
        """Return the real tokens of some sequences, and how many of them have a next one; at least one each."""
        tokens, predicted = self.head.counts(self.data.batch[rows], self.data.targets.shape[1])
        return max(1, tokens), max(1, predicted)


def measurement(found: HeldOut, history: History, config: RecoveryConfig) -> Measurement:
    """Return what is noted of a check; a state that is not finite, or whose activations grew or shrank, is not kept."""
    start = HeldOut(**history.checks[0][1]) if history.checks else found
    kept = found.finite and found.near(start)
    return Measurement(asdict(found), found.loss(config.lm) if kept else math.inf)


def rises(history: History, config: RecoveryConfig) -> bool:
    """Tell whether the latest held-out loss lies above the best one, or a loss is not finite; waits for the device."""
    if history.first_bad_step() is not None:
        return True
    return measurement(HeldOut(**history.checks[-1][1]), history, config).total > WORSE * history.best


def warn_of_end(state: TrainingState) -> None:
    """Warn where the recovery brought nothing."""
    history = state.histories[ALL]
    if state.stopped == "not finite":
        logger.warning("recovery: the loss is not finite at the start; the blocks stay as they were")
    elif not history.best_step:
        halved = f", not with the rate halved {len(history.halved)} times either" if history.halved else ""
        logger.warning("recovery did not improve on the held-out sequences%s; the blocks stay as they were", halved)


def _update(learner: Learner, tokens: int) -> None:
    """Take an optimiser step on the gradients of a sum over tokens."""
    for parameter in learner.student.parameters():
        if parameter.grad is not None:
            parameter.grad.div_(tokens)
    learner.update()

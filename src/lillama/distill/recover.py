"""The recovery tail as values: its part of a recipe, what is measured, and its record."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, with_config
from torch import Tensor

from lillama.distill.config import DistillConfig
from lillama.distill.trace import CURVE_POINTS

DIVERGED = 1.5  # times the start's held-out loss: no falling rate will mend that
NORM_LIMIT = 1.5  # a state whose last activations grew or shrank by more than this is not kept


@with_config(extra="forbid")
@dataclass(frozen=True)
class RecoverConfig:
    """The recovery tail: all compressed blocks learn together to give the original's predictions.

    Attributes:
        epochs: passes over the calibration tokens; 0 leaves the blocks as distillation made them.
        batch_size: sequences in one optimiser step.
        lr: learning rate; it rises linearly, then falls along a cosine to 0.
        lr_scale: what the rate is relative to, `rms` or `width`, as in `distill`.
        lr_width: as in `distill`.
        warmup: share of the steps in which the rate rises.
        clip: largest norm of each block's gradient of the mean loss; None clips nothing.
        lm: share of the text's own cross-entropy in the loss; the rest is the divergence from the original's predictions.
        checks: how often the loss on held-out sequences is measured after the start.
        trains: `all` parameters of the compressed blocks, or only the `routers` of their experts, which after any change of
            the experts is a short way back (REAP reports the same after dropping experts).

    Examples:
        >>> RecoverConfig(epochs=4).training.lr_scale
        'rms'
    """

    epochs: Annotated[int, Field(ge=0)] = 8
    batch_size: Annotated[int, Field(ge=1)] = 8
    lr: Annotated[float, Field(gt=0)] = 4e-3
    lr_scale: Literal["width", "rms"] = "rms"
    lr_width: Annotated[int, Field(ge=1)] | None = 256
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    lm: Annotated[float, Field(ge=0, le=1)] = 0.0
    checks: Annotated[int, Field(ge=1)] = 8
    trains: Literal["all", "routers"] = "all"

    @property
    def training(self) -> DistillConfig:
        """The same choices in the words of distillation, whose learners and batches serve here too."""
        return DistillConfig(
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            lr_scale=self.lr_scale,
            lr_width=self.lr_width,
            lr_schedule="cosine",
            warmup=self.warmup,
            weight_decay=0.0,
            clip=self.clip,
        )

    def check_steps(self, steps: int) -> set[int]:
        """Return the steps after which the held-out loss is measured; the last one is among them."""
        return {math.ceil(steps * k / self.checks) for k in range(1, self.checks + 1)}

    def patience(self) -> int:
        """Return after how many checks without progress training ends: half of them, at least two."""
        return max(2, math.ceil(self.checks / 2))


@dataclass(frozen=True)
class HeldOut:
    """What is measured on the held-out sequences.

    Attributes:
        kl: divergence `KL(original || compressed)` of the next token, mean over the real tokens, in nats.
        lm: cross-entropy of the text, mean over the tokens that have a next one, in nats.
        norm: length of the last block's outputs over those of the original, mean over the real tokens.
    """

    kl: float
    lm: float
    norm: float

    @property
    def finite(self) -> bool:
        """Whether all of it is finite."""
        return all(map(math.isfinite, (self.kl, self.lm, self.norm)))

    def loss(self, lm: float) -> float:
        """Return what is minimised, where the text has the share `lm`."""
        return (1 - lm) * self.kl + lm * self.lm if lm else self.kl

    def near(self, start: "HeldOut") -> bool:
        """Tell whether the activations are about as long as they were at the start."""
        return 1 / NORM_LIMIT <= self.norm / start.norm <= NORM_LIMIT


@dataclass(frozen=True)
class RecoverLog:
    """What happened in the recovery tail.

    Attributes:
        steps: optimiser steps taken.
        tokens: real tokens trained on, repeated ones counted again.
        lr: peak learning rate.
        seconds: that it took, interruptions left out.
        initial: measured before the first step; None if it was not finite.
        final: of the state that was kept; None if it was not finite.
        improved: false if the start was kept.
        best_step: after which the kept state was reached.
        stopped: why training ended before its last step: `"not finite"`, `"diverged"` (the held-out loss is half as much
            again as at the start), `"no progress"` (better than the start, but not lately), or `""`: it did not.
        curve: rows of step, divergence and cross-entropy on the batch.
        held_out: rows of step, divergence, cross-entropy and norm on the held-out sequences.
        grown: linear -> growth of its largest singular value from start to kept state, where that is more than half.
    """

    steps: int
    tokens: int
    lr: float
    seconds: float
    initial: HeldOut | None
    final: HeldOut | None
    improved: bool
    best_step: int
    stopped: str
    curve: tuple[tuple[int, float, float], ...]
    held_out: tuple[tuple[int, float, float, float], ...]
    grown: Mapping[str, float] = field(default_factory=dict)


@dataclass
class RecoverTrace:
    """What is remembered during the recovery tail.

    Attributes:
        lm: share of the text in the loss.
        losses: of every step: divergence and cross-entropy; they stay on the device, so that no step waits for it.
        checks: step and held-out figures; the first is the start.
        best: place in `checks` of the best state so far.
        best_states: block index -> its parameters then; empty while the start is the best.
        tokens: real tokens trained on.
        stopped: as in `RecoverLog`.
    """

    lm: float
    losses: list[Float[Tensor, "2"]] = field(default_factory=list)
    checks: list[tuple[int, HeldOut]] = field(default_factory=list)
    best: int = 0
    best_states: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    tokens: int = 0
    stopped: str = ""

    def check(self, step: int, held_out: HeldOut, states: Callable[[], dict[int, dict[str, Tensor]]]) -> None:
        """Note a measurement, and keep the states if they are better than all before."""
        self.checks.append((step, held_out))
        start, best = self.checks[0][1], self.checks[self.best][1]
        if held_out.finite and held_out.near(start) and held_out.loss(self.lm) < best.loss(self.lm):
            self.best, self.best_states = len(self.checks) - 1, states()

    def reason_to_stop(self, patience: int) -> str:
        """Return why training should end now, or an empty text; waits for the device.

        While the rate is high the loss may lie above the start's for long and still end below it.
        """
        start, latest = self.checks[0][1], self.checks[-1][1]
        if not (latest.finite and all(bool(loss.isfinite().all()) for loss in self.losses)):
            return "not finite"
        if latest.loss(self.lm) > DIVERGED * start.loss(self.lm):
            return "diverged"
        return "no progress" if self.best and len(self.checks) - 1 - self.best >= patience else ""

    def as_json(self) -> dict[str, Any]:
        """Return all but the best states as JSON values."""
        return {
            "losses": [loss.tolist() for loss in self.losses],
            "checks": [(step, asdict(held_out)) for step, held_out in self.checks],
            "best": self.best,
            "tokens": self.tokens,
        }

    @classmethod
    def from_json(cls, lm: float, value: Mapping[str, Any], best: dict[int, dict[str, Tensor]]) -> "RecoverTrace":
        """Return the trace that `as_json` wrote."""
        losses = [torch.tensor(loss) for loss in value["losses"]]
        checks = [(step, HeldOut(**held_out)) for step, held_out in value["checks"]]
        return cls(lm, losses, checks, value["best"], best, value["tokens"])

    def log(self, lr: float, seconds: float) -> RecoverLog:
        """Return the record of the training."""
        stride = max(1, len(self.losses) // CURVE_POINTS)
        (_, initial), (best_step, final) = self.checks[0], self.checks[self.best]
        rows = [(step + 1, *self.losses[step].tolist()) for step in range(0, len(self.losses), stride)]
        held_out = [(step, found.kl, found.lm, found.norm) for step, found in self.checks]
        return RecoverLog(
            steps=len(self.losses),
            tokens=self.tokens,
            lr=lr,
            seconds=seconds,
            initial=initial if initial.finite else None,
            final=final if final.finite else None,
            improved=self.best > 0,
            best_step=best_step,
            stopped=self.stopped,
            curve=tuple(row for row in rows if all(map(math.isfinite, row))),
            held_out=tuple(row for row in held_out if all(map(math.isfinite, row))),
        )

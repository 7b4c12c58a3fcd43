"""The record of one block's training: losses, held-out checks, and the best state so far."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CURVE_POINTS = 200
GROWTH = 1.5  # of a largest singular value that is worth a warning
Row = tuple[int, float | None, float | None]


@dataclass(frozen=True)
class DistillLog:
    """What happened to one block.

    Attributes:
        block: name.
        steps: optimiser steps taken.
        tokens: real tokens trained on, repeated ones counted again.
        lr: peak learning rate of the attempt that counted.
        initial: held-out loss of the initialisation, summed over the streams.
        final: held-out loss of the state that was kept.
        improved: false if the initialisation was kept.
        best_step: after which the kept state was reached.
        retried: whether a non-finite loss made a second attempt necessary.
        curve: rows of step, training loss on the teacher's stream, and on the student's (None: not fed).
        held_out: rows of step and held-out loss, for the same two streams.
        singular: linear within the block -> largest singular value of its factors' product, before training and in the
            state that was kept.
    """

    block: str
    steps: int
    tokens: int
    lr: float
    initial: float
    final: float
    improved: bool
    best_step: int
    retried: bool
    curve: tuple[Row, ...]
    held_out: tuple[Row, ...]
    singular: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def grown(self) -> dict[str, float]:
        """Linears whose largest singular value grew by more than half -> by what factor."""
        ratios = {name: kept / start for name, (start, kept) in self.singular.items() if start > 0}
        return {name: ratio for name, ratio in ratios.items() if ratio > GROWTH}


@dataclass
class Trace:
    """What is remembered while a block is taught.

    Attributes:
        losses: of every step: stream -> loss; they stay on the device, so that no step waits for it.
        checks: step and stream -> held-out loss.
        best: smallest held-out loss, summed over the streams.
        best_step: after which it was reached.
        best_state: parameters of that moment.
        singular: linear -> largest singular value before training.
    """

    losses: list[dict[str, Tensor]] = field(default_factory=list)
    checks: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    best: float = math.inf
    best_step: int = 0
    best_state: dict[str, Tensor] = field(default_factory=dict)
    singular: dict[str, float] = field(default_factory=dict)

    def check(self, step: int, losses: dict[str, float], state: Callable[[], dict[str, Tensor]]) -> None:
        """Note the held-out losses after a step, and keep the state if it is the best so far."""
        self.checks.append((step, losses))
        if self.latest < self.best:
            self.best, self.best_step, self.best_state = self.latest, step, state()

    @property
    def latest(self) -> float:
        """The last held-out loss, summed over the streams."""
        return sum(self.checks[-1][1].values())

    def recent_loss(self) -> float:
        """Return the training loss of the step before the last, summed over the streams: the device is done with it."""
        return float(sum(self.losses[-2:][0].values()))

    def first_bad_step(self) -> int | None:
        """Return the first step whose loss was not finite, if a loss or a held-out loss was not."""
        totals = torch.stack([torch.stack(list(losses.values())).sum() for losses in self.losses])
        bad = (~totals.isfinite()).nonzero()
        if len(bad):
            return int(bad[0]) + 1
        return None if math.isfinite(self.latest) else self.checks[-1][0]

    def forget_bad(self) -> None:
        """Drop the record of the steps since the last sound check, after the best state was restored."""
        while self.checks and not math.isfinite(self.latest):
            self.checks.pop()
        self.losses = [losses for losses in self.losses if all(loss.isfinite() for loss in losses.values())]

    def as_json(self) -> dict[str, Any]:
        """Return all but the best state as JSON values."""
        losses = [{stream: float(loss) for stream, loss in row.items()} for row in self.losses]
        numbers = {"best": self.best, "best_step": self.best_step, "singular": self.singular}
        return {"losses": losses, "checks": self.checks} | numbers

    @classmethod
    def from_json(cls, value: Mapping[str, Any], best_state: dict[str, Tensor]) -> "Trace":
        """Return the trace that `as_json` wrote."""
        losses = [{stream: torch.tensor(loss) for stream, loss in row.items()} for row in value["losses"]]
        checks = [(step, means) for step, means in value["checks"]]
        return cls(losses, checks, value["best"], value["best_step"], best_state, value["singular"])

    def log(self, block: str, lr: float, tokens: int, retried: bool, singular: Mapping[str, float]) -> DistillLog:
        """Return the record of the training; `singular` holds the largest singular values of the kept state."""
        stride = max(1, len(self.losses) // CURVE_POINTS)
        return DistillLog(
            block=block,
            steps=len(self.losses),
            tokens=tokens,
            lr=lr,
            initial=sum(self.checks[0][1].values()),
            final=self.best,
            improved=self.best_step > 0,
            best_step=self.best_step,
            retried=retried,
            curve=tuple(_row(step + 1, self.losses[step]) for step in range(0, len(self.losses), stride)),
            held_out=tuple(_row(step, losses) for step, losses in self.checks),
            singular={name: (start, singular[name]) for name, start in self.singular.items()},
        )


def _row(step: int, losses: Mapping[str, Any]) -> Row:
    teacher, student = (float(losses[stream]) if stream in losses else None for stream in ("teacher", "student"))
    return step, teacher, student

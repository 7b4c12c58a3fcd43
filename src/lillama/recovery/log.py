"""What recovery measures on held-out sequences, and its record."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import FiniteFloat
from typing_extensions import TypedDict

from lillama.distill.history import History
from lillama.distill.trainer import TrainingState
from lillama.files.artefacts import Count

NORM_LIMIT = 1.5  # a state whose last activations grew or shrank by more than this is not kept


class HeldOutJson(TypedDict):
    """What is measured on the held-out sequences, in JSON."""

    kl: float
    lm: float
    norm: float


class RecoveryJson(TypedDict):
    """`recovered/log.json`."""

    steps: Count
    tokens: Count
    lr: float
    seconds: float
    initial: HeldOutJson | None
    final: HeldOutJson | None
    improved: bool
    best_step: Count
    stopped: str
    halved: Sequence[Count]
    curve: Sequence[tuple[Count, FiniteFloat, FiniteFloat]]
    held_out: Sequence[tuple[Count, FiniteFloat, FiniteFloat, FiniteFloat]]
    grown: Mapping[str, FiniteFloat]


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

    def as_json(self) -> HeldOutJson:
        """Return the value for JSON."""
        return {"kl": self.kl, "lm": self.lm, "norm": self.norm}


@dataclass(frozen=True)
class RecoveryLog:
    """What happened in recovery.

    Attributes:
        steps: optimiser steps taken.
        tokens: real tokens trained on, repeated ones counted again.
        lr: peak learning rate.
        seconds: that it took, interruptions left out.
        initial: measured before the first step; None if it was not finite.
        final: of the state that was kept; None if it was not finite.
        improved: false if the start was kept.
        best_step: after which the kept state was reached.
        stopped: why training ended before its last step: `"not finite"` at the start, `"no progress"` (better than the
            start, but not lately), or `""`: it did not.
        halved: steps after which all blocks went back to their best state, at half the rate, since the loss had risen.
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
    halved: tuple[int, ...]
    curve: tuple[tuple[int, float, float], ...]
    held_out: tuple[tuple[int, float, float, float], ...]
    grown: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> RecoveryJson:
        """Return the value for JSON."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "lr": self.lr,
            "seconds": self.seconds,
            "initial": None if self.initial is None else self.initial.as_json(),
            "final": None if self.final is None else self.final.as_json(),
            "improved": self.improved,
            "best_step": self.best_step,
            "stopped": self.stopped,
            "halved": self.halved,
            "curve": self.curve,
            "held_out": self.held_out,
            "grown": self.grown,
        }

    @classmethod
    def of(cls, lr: float, state: TrainingState, history: History) -> "RecoveryLog":
        """Return the record of a training; rows that are not finite are left out."""
        initial, final = HeldOut(**history.checks[0][1]), HeldOut(**history.best_check)
        curve = [(step, losses["kl"], losses["lm"]) for step, losses in history.curve()]
        held_out = [(step, found["kl"], found["lm"], found["norm"]) for step, found in history.checks]
        return cls(
            steps=state.done,
            tokens=history.tokens,
            lr=lr,
            seconds=state.seconds,
            initial=initial if initial.finite else None,
            final=final if final.finite else None,
            improved=history.best_step > 0,
            best_step=history.best_step,
            stopped=state.stopped,
            halved=tuple(history.halved),
            curve=tuple(row for row in curve if all(map(math.isfinite, row))),
            held_out=tuple(row for row in held_out if all(map(math.isfinite, row))),
        )

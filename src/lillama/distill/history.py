"""The record of a training: losses of the steps, held-out losses, and the best state so far."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CURVE_POINTS = 200
State = dict[str, Tensor]


@dataclass(frozen=True)
class Measurement:
    """What was measured on the held-out sequences.

    Attributes:
        parts: name -> value, as they are recorded.
        total: what is minimised; infinite where the state may not be kept.
    """

    parts: dict[str, float]
    total: float


@dataclass
class History:
    """What is remembered of a training: of one block, or of several that have one loss.

    Attributes:
        losses: of every step: name -> loss; they stay on the device, so that no step waits for it.
        checks: step, and name -> value on the held-out sequences; the first is the start.
        tokens: real tokens trained on, repeated ones counted again.
        best: smallest held-out loss.
        best_step: after which it was reached.
        best_states: block index -> parameters of that moment.
        retried: whether the rate was halved because a loss was not finite.
        halved: steps after which all went back to the best state, at half the rate.
        singular: linear -> largest singular value before training, where that is watched.
    """

    losses: list[dict[str, Tensor]] = field(default_factory=list)
    checks: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    tokens: int = 0
    best: float = math.inf
    best_step: int = 0
    best_states: dict[int, State] = field(default_factory=dict)
    retried: bool = False
    halved: list[int] = field(default_factory=list)
    singular: dict[str, float] = field(default_factory=dict)

    @property
    def best_check(self) -> dict[str, float]:
        """What was measured on the held-out sequences when the best state was reached."""
        return next(parts for step, parts in self.checks if step == self.best_step)

    @property
    def checks_since_best(self) -> int:
        """How many checks brought nothing since the best one."""
        return sum(step > self.best_step for step, _ in self.checks)

    def note(self, losses: dict[str, Tensor], tokens: int) -> None:
        """Note the losses of a step, and how many real tokens it was taken on."""
        self.losses.append(losses)
        self.tokens += tokens

    def check(self, step: int, found: Measurement, states: Callable[[], dict[int, State]]) -> None:
        """Note a measurement after a step, and keep the states if they are the best so far."""
        self.checks.append((step, found.parts))
        if found.total < self.best:
            self.best, self.best_step, self.best_states = found.total, step, states()

    def first_bad_step(self) -> int | None:
        """Return the first step whose loss was not finite, if one was not, or the last check; waits for the device."""
        if self.losses:
            totals = torch.stack([torch.stack(list(losses.values())).sum() for losses in self.losses])
            bad = (~totals.isfinite()).nonzero()
            if len(bad):
                return int(bad[0]) + 1
        return None if self._sound(self.checks[-1][1]) else self.checks[-1][0]

    def forget_bad(self) -> None:
        """Drop the record of the steps since the last sound check, after the best state was restored."""
        while self.checks and not self._sound(self.checks[-1][1]):
            self.checks.pop()
        self.losses = [losses for losses in self.losses if all(loss.isfinite() for loss in losses.values())]

    def curve(self) -> list[tuple[int, dict[str, float]]]:
        """Return step, and name -> loss, of at most a few hundred steps."""
        stride = max(1, len(self.losses) // CURVE_POINTS)
        steps = range(0, len(self.losses), stride)
        return [(step + 1, {name: float(loss) for name, loss in self.losses[step].items()}) for step in steps]

    def as_json(self) -> dict[str, Any]:
        """Return all but the best states as JSON values."""
        return {
            "losses": [{name: float(loss) for name, loss in losses.items()} for losses in self.losses],
            "checks": self.checks,
            "tokens": self.tokens,
            "best": self.best,
            "best_step": self.best_step,
            "retried": self.retried,
            "halved": self.halved,
            "singular": self.singular,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], best_states: dict[int, State]) -> "History":
        """Return the history that `as_json` wrote."""
        losses = [{name: torch.tensor(loss) for name, loss in losses.items()} for losses in value["losses"]]
        checks = [(step, parts) for step, parts in value["checks"]]
        return cls(**{**value, "losses": losses, "checks": checks, "best_states": best_states})

    @staticmethod
    def _sound(parts: Mapping[str, float]) -> bool:
        return math.isfinite(sum(parts.values()))

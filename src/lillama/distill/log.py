"""How a block was taught, as it is written beside its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import FiniteFloat
from typing_extensions import TypedDict

from lillama.distill.history import History
from lillama.files.artefacts import Count

GROWTH = 1.5  # of a largest singular value that is worth a warning
CurveRow = tuple[int, float | None, float | None]
RowJson = tuple[Count, FiniteFloat | None, FiniteFloat | None]


class BlockLogJson(TypedDict):
    """How a block was taught, in `blocks/*.json`."""

    block: str
    steps: Count
    tokens: Count
    lr: float
    initial: FiniteFloat
    final: FiniteFloat
    improved: bool
    best_step: Count
    retried: bool
    curve: Sequence[RowJson]
    held_out: Sequence[RowJson]
    singular: Mapping[str, tuple[FiniteFloat, FiniteFloat]]


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
    curve: tuple[CurveRow, ...]
    held_out: tuple[CurveRow, ...]
    singular: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, block: str, lr: float, history: History, singular: Mapping[str, float]) -> "DistillLog":
        """Return the record of a training; `singular` holds the largest singular values of the kept state."""
        return cls(
            block=block,
            steps=len(history.losses),
            tokens=history.tokens,
            lr=lr,
            initial=sum(history.checks[0][1].values()),
            final=history.best,
            improved=history.best_step > 0,
            best_step=history.best_step,
            retried=history.retried,
            curve=tuple(_row(step, losses) for step, losses in history.curve()),
            held_out=tuple(_row(step, losses) for step, losses in history.checks),
            singular={name: (start, singular[name]) for name, start in history.singular.items()},
        )

    @property
    def grown(self) -> dict[str, float]:
        """Linears whose largest singular value grew by more than half -> by what factor."""
        ratios = {name: kept / start for name, (start, kept) in self.singular.items() if start > 0}
        return {name: ratio for name, ratio in ratios.items() if ratio > GROWTH}

    def as_json(self) -> BlockLogJson:
        """Return the value for JSON."""
        return {
            "block": self.block,
            "steps": self.steps,
            "tokens": self.tokens,
            "lr": self.lr,
            "initial": self.initial,
            "final": self.final,
            "improved": self.improved,
            "best_step": self.best_step,
            "retried": self.retried,
            "curve": self.curve,
            "held_out": self.held_out,
            "singular": self.singular,
        }


def _row(step: int, losses: Mapping[str, float]) -> CurveRow:
    return step, losses.get("teacher"), losses.get("student")

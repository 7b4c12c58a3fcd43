"""How long work tells how far it is: the library calls a function with a `Progress`, the command line draws it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One moment of a running task.

    Attributes:
        task: which task: `"calibration"`, `"fisher"`, `"ranks"`, `"blocks"`, `"steps"`, `"recover"`, `"perplexity"`, ...
        done: units finished.
        total: units in all.
        detail: what is at work now, for example a block's name.
        tokens: tokens processed by this task so far; 0 where tokens make no sense.
        loss: current training loss, if the task trains.
    """

    task: str
    done: int
    total: int
    detail: str = ""
    tokens: int = 0
    loss: float | None = None


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Report nothing."""

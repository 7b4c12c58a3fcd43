"""How all blocks learn together in the end: the part of a recipe that recovery reads."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, with_config

from lillama.distill.config import OptimConfig

BETAS = (0.9, 0.95)  # of AdamW, as distillation has them
GUESS = 4e-3  # rate that the search for a better one begins with


@with_config(extra="forbid")
@dataclass(frozen=True)
class RecoveryConfig:
    """Recovery: all compressed blocks learn together to give the original's predictions.

    Attributes:
        epochs: passes over the calibration tokens; 0 leaves the blocks as distillation made them.
        steps: optimiser steps in all, in the place of `epochs`; what `--time` chose is written here.
        batch_size: sequences in one optimiser step.
        lr: learning rate; it rises linearly, then falls along a cosine to 0. None measures it: the loss after a first step
            says how far steps may go (`lillama.distill.rate`).
        lr_scale: what the rate is relative to, `rms` or `width`, as in `distill`.
        lr_width: as in `distill`.
        warmup: share of the steps in which the rate rises.
        clip: largest norm of each block's gradient of the mean loss; None clips nothing.
        lm: share of the text's own cross-entropy in the loss; the rest is the divergence from the original's predictions.
        checks: how often the loss on held-out sequences is measured after the start.
        trains: `all` parameters of the compressed blocks, or only the `routers` of their experts, which after any change of
            the experts is a short way back (REAP reports the same after dropping experts).

    Examples:
        >>> RecoveryConfig(epochs=4).optim.lr_scale
        'rms'
    """

    epochs: Annotated[int, Field(ge=0)] = 8
    steps: Annotated[int, Field(ge=0)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 8
    lr: Annotated[float, Field(gt=0)] | None = None
    lr_scale: Literal["width", "rms"] = "rms"
    lr_width: Annotated[int, Field(ge=1)] | None = 256
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    lm: Annotated[float, Field(ge=0, le=1)] = 0.0
    checks: Annotated[int, Field(ge=1)] = 8
    trains: Literal["all", "routers"] = "all"

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do."""
        return self.epochs > 0 if self.steps is None else self.steps > 0

    @property
    def optim(self) -> OptimConfig:
        """The optimiser and its rate: AdamW without decay, along a cosine."""
        return OptimConfig(
            lr=GUESS if self.lr is None else self.lr,
            lr_scale=self.lr_scale,
            lr_width=self.lr_width,
            lr_schedule="cosine",
            warmup=self.warmup,
            betas=BETAS,
            weight_decay=0.0,
            clip=self.clip,
        )

    @property
    def patience(self) -> int:
        """After how many checks without progress training ends: half of them, at least two."""
        return max(2, math.ceil(self.checks / 2))

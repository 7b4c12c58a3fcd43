"""How blocks are taught: the part of a recipe that distillation reads."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, with_config

from lillama.distill.losses import Loss, Mse


@with_config(extra="forbid")
@dataclass(frozen=True)
class DistillConfig:
    """Local distillation of blocks (arXiv 2412.16719, section 3).

    Attributes:
        schedule: `sequential` finishes one block after the other; `joint` trains all blocks on every batch, as published.
        stream: whose activations feed the student: the `teacher`'s, the `student`'s own, or `both` (the losses add up).
        loss: between the student's and the teacher's outputs.
        epochs: passes over the calibration tokens; 0 keeps the initialisation.
        batch_size: sequences in one optimiser step.
        lr: learning rate, at a hidden size of `lr_width`.
        lr_width: the rate is multiplied by `lr_width / hidden size`, Adam's rule for growing width (muP, arXiv
            2203.03466); None uses `lr` as it stands.
        lr_schedule: `cosine` falls to 0 at the last step; `constant` stays.
        warmup: share of the steps in which the rate rises linearly from 0.
        betas: of AdamW.
        weight_decay: of AdamW.
        clip: largest norm of a block's gradient; None clips nothing.
        held_out: share of the calibration sequences on which the best state is chosen, never trained on.
    """

    schedule: Literal["sequential", "joint"] = "sequential"
    stream: Literal["teacher", "student", "both"] = "student"
    loss: Annotated[Loss, Field(discriminator="name")] = field(default_factory=Mse)
    epochs: Annotated[int, Field(ge=0)] = 4
    batch_size: Annotated[int, Field(ge=1)] = 8
    lr: Annotated[float, Field(gt=0)] = 2e-3
    lr_width: Annotated[int, Field(ge=1)] | None = 256
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.0625

    def peak_lr(self, hidden_size: int) -> float:
        """Return the learning rate after warm-up for a model of this hidden size."""
        return self.lr if self.lr_width is None else self.lr * self.lr_width / hidden_size

    def lr_factor(self, step: int, steps: int) -> float:
        """Return the share of the peak rate at a step from 0 to `steps` - 1."""
        warm = max(1, round(self.warmup * steps)) if self.warmup else 0
        if step < warm:
            return (step + 1) / warm
        if self.lr_schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

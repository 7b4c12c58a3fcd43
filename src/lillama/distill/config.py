"""How blocks are taught: the part of a recipe that distillation reads."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, with_config

from lillama.distill.losses import Loss, Mse
from lillama.errors import RecipeError

CHECKS = 4  # at least this often is the held-out loss measured in one training


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser (AdamW) and its rate: the part that distillation and recovery have in common.

    Attributes:
        lr: learning rate, at a hidden size of `lr_width`, or relative to each tensor.
        lr_scale: `width` or `rms`, as `DistillConfig` tells.
        lr_width: hidden size at which `lr` holds, where `lr_scale` is `width`; None uses `lr` as it stands.
        lr_schedule: `cosine` falls to 0 at the last step; `constant` stays.
        warmup: share of the steps in which the rate rises linearly from 0.
        betas: of AdamW.
        weight_decay: of AdamW.
        clip: largest norm of a block's gradient; None clips nothing.
    """

    lr: float
    lr_scale: Literal["width", "rms"]
    lr_width: int | None
    lr_schedule: Literal["constant", "cosine"]
    warmup: float
    betas: tuple[float, float]
    weight_decay: float
    clip: float | None

    def peak_lr(self, hidden_size: int) -> float:
        """Return the learning rate after warm-up for a model of this hidden size, before each tensor's own scale."""
        return self.lr if self.lr_width is None or self.lr_scale == "rms" else self.lr * self.lr_width / hidden_size

    def lr_factor(self, step: int, steps: int) -> float:
        """Return the share of the peak rate at a step from 0 to `steps` - 1."""
        warm = max(1, round(self.warmup * steps)) if self.warmup else 0
        if step < warm:
            return (step + 1) / warm
        if self.lr_schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@with_config(extra="forbid")
@dataclass(frozen=True)
class DistillConfig:
    """Local distillation of blocks (arXiv 2412.16719, section 3).

    Attributes:
        schedule: `sequential` finishes one block after the other; `joint` trains all blocks on every batch, as published.
        stream: whose activations feed the student: the `teacher`'s, the `student`'s own, or `both` (the losses add up).
        loss: between the student's and the teacher's outputs.
        norm: weight of `(|a| - |y|)^2 / |y|^2` beside the loss, for losses that do not see the scale; `a` is the student's
            output of a token, `y` the target.
        look_ahead: weight of `loss(f(a), f(y))` with `f` the teacher's next block, frozen. 0 leaves it out.
        sub_blocks: weight of `mean_c loss(a_c, y_c)` over the outputs of the block's children `c` that hold factorised
            linears (attention, MLP). 0 leaves it out.
        adaptive: weight `w` in the target of the student's stream, `y = (1 - w) B(x) + w B(x')` with `B` the teacher's block,
            `x` the teacher's input and `x'` the student's own: 0 is anchored to the original, 1 forgets the errors made below.
        epochs: passes over the calibration tokens; 0 keeps the initialisation.
        blocks: that are taught so: `all` of them, or only those that recovery leaves `unrecovered`, such as an encoder's:
            what a block learns alone, recovery learns better (docs/findings.md).
        tokens: that initialisation and distillation see, of the calibration tokens; None: all. Recovery sees all: of more
            text it learns more, where the moments of the closed form gain little and cost most.
        batch_size: sequences in one optimiser step.
        lr: learning rate, at a hidden size of `lr_width`, or relative to each tensor.
        lr_scale: `width` multiplies the rate by `lr_width / hidden size`, Adam's rule for growing width (muP, arXiv
            2203.03466); `rms` gives each tensor a rate of its own, `lr` times the root mean square of its initial values
            (relative steps as in Adafactor, arXiv 1804.04235), so that no small factor is overrun.
        lr_width: where `lr_scale` is `width`; None uses `lr` as it stands.
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
    norm: Annotated[float, Field(ge=0)] = 0.0
    look_ahead: Annotated[float, Field(ge=0)] = 0.0
    sub_blocks: Annotated[float, Field(ge=0)] = 0.0
    adaptive: Annotated[float, Field(ge=0, le=1)] = 0.0
    epochs: Annotated[int, Field(ge=0)] = 4
    blocks: Literal["all", "unrecovered"] = "unrecovered"
    tokens: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 8
    lr: Annotated[float, Field(gt=0)] = 4e-2
    lr_scale: Literal["width", "rms"] = "rms"
    lr_width: Annotated[int, Field(ge=1)] | None = 256
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.0625

    def __post_init__(self) -> None:
        sequential = {"look_ahead": self.look_ahead, "sub_blocks": self.sub_blocks}
        for key, weight in sequential.items():
            if weight and self.schedule == "joint":
                raise RecipeError(
                    f"distill.{key} is {weight:g}: the schedule joint compares the outputs of blocks only, since its targets "
                    f"are computed anew at every step; set distill.{key} to 0, or distill.schedule to sequential"
                )
        if self.adaptive and self.stream == "teacher":
            raise RecipeError(
                f"distill.adaptive is {self.adaptive:g}: the stream teacher feeds no student's input that a target could "
                "adapt to; set distill.adaptive to 0, or distill.stream to student or both"
            )

    @property
    def optim(self) -> OptimConfig:
        """The optimiser and its rate."""
        return OptimConfig(
            lr=self.lr,
            lr_scale=self.lr_scale,
            lr_width=self.lr_width,
            lr_schedule=self.lr_schedule,
            warmup=self.warmup,
            betas=self.betas,
            weight_decay=self.weight_decay,
            clip=self.clip,
        )

    @property
    def checks(self) -> int:
        """How often the held-out loss is measured after the start: after each epoch, and at least four times."""
        return max(CHECKS, self.epochs)

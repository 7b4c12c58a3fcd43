"""One block that learns: fp32 master weights, an optimiser, one step at a time."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lillama.distill.config import DistillConfig
from lillama.stream.calls import BlockCall


@dataclass(frozen=True)
class MicroBatch:
    """A few sequences at one block.

    Attributes:
        call: what the block is given besides its hidden state.
        inputs: stream (`teacher` or `student`) -> hidden states that enter the student.
        target: the teacher's output for the teacher's input.
        mask: true at real tokens; None if all are.
    """

    call: BlockCall
    inputs: Mapping[str, Float[Tensor, "sequences length width"]]
    target: Float[Tensor, "sequences length width"]
    mask: Bool[Tensor, "sequences length"] | None

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return self.target.shape[0] * self.target.shape[1] if self.mask is None else int(self.mask.sum())

    @property
    def real_targets(self) -> Float[Tensor, "tokens width"]:
        """The target at the real tokens."""
        return self.target.flatten(0, 1) if self.mask is None else self.target[self.mask]


class Learner:
    """A student block under training.

    The student's parameters are fp32 masters, and so is the optimiser's state. When activations come in another type, the
    block computes with copies of the masters in that type, as the finished model will, and gradients flow into the masters.
    The block stays in evaluation mode: dropout would only blur the target.

    Args:
        student: the block; its parameters become fp32 and trainable.
        config: of the distillation.
        lr: peak learning rate.
        steps: optimiser steps in all.
        unit: losses are divided by this.
    """

    def __init__(self, student: nn.Module, config: DistillConfig, lr: float, steps: int, unit: float) -> None:
        self.student = student.float().eval().requires_grad_(True)
        self.config, self.lr, self.steps, self.unit = config, lr, steps, unit
        self.step_count = 0
        self.optimiser = torch.optim.AdamW(
            self.student.parameters(), lr=lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )

    def step(self, batch: Sequence[MicroBatch]) -> dict[str, Tensor]:
        """Take one optimiser step on the sum of the streams' losses, averaged over the batch's real tokens.

        Returns:
            stream -> loss before the step, a detached scalar on the device.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * self.config.lr_factor(self.step_count, self.steps)
        tokens = sum(micro.tokens for micro in batch)
        losses: dict[str, Tensor] = {}
        for micro in batch:
            for stream in micro.inputs:
                loss = self._loss(micro, stream) / tokens
                (loss * self._weight(micro)).backward()
                losses[stream] = losses.get(stream, 0) + loss.detach()
        if self.config.clip is not None:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.config.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step_count += 1
        return losses

    @torch.no_grad()
    def validate(self, batches: Iterable[MicroBatch]) -> dict[str, float]:
        """Return stream -> mean loss over the real tokens of some micro-batches."""
        sums: dict[str, Tensor] = {}
        tokens = 0
        for micro in batches:
            tokens += micro.tokens
            for stream in micro.inputs:
                sums[stream] = sums.get(stream, 0) + self._loss(micro, stream)
        return {stream: (total / tokens).item() for stream, total in sums.items()}

    @torch.no_grad()
    def forward(self, call: BlockCall, hidden: Tensor) -> Tensor:
        """Run the student as it is now."""
        return self._run(call, hidden)

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the student's parameters."""
        return {name: parameter.detach().clone() for name, parameter in self.student.named_parameters()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Set the student's parameters; the optimiser's state is left as it is."""
        for name, parameter in self.student.named_parameters():
            parameter.copy_(state[name])

    def snapshot(self) -> dict[str, Tensor]:
        """Return the parameters and the optimiser's state under plain names, to be written to a file."""
        moments = {
            f"{key}.{name}": self.optimiser.state[parameter][key]
            for name, parameter in self.student.named_parameters()
            for key in ("exp_avg", "exp_avg_sq", "step")
            if parameter in self.optimiser.state
        }
        return {
            f"parameter.{name}": parameter.detach() for name, parameter in self.student.named_parameters()
        } | moments

    def resume(self, snapshot: Mapping[str, Tensor], step_count: int) -> None:
        """Go on from a snapshot."""
        self.restore(
            {name.removeprefix("parameter."): t for name, t in snapshot.items() if name.startswith("parameter.")}
        )
        self.step_count = step_count
        for name, parameter in self.student.named_parameters():
            if f"step.{name}" in snapshot:
                state = {
                    key: snapshot[f"{key}.{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq", "step")
                }
                self.optimiser.state[parameter] = state

    def _loss(self, micro: MicroBatch, stream: str) -> Tensor:
        """Return the sum of the loss over the real tokens of one stream."""
        output = self._run(micro.call, micro.inputs[stream])
        losses = self.config.loss(output.float(), micro.target.float())
        return (losses if micro.mask is None else losses[micro.mask]).sum() / self.unit

    def _weight(self, micro: MicroBatch) -> float:
        """Return how often a stream counts: twice where both are wanted, but the student's is still the teacher's."""
        return 2.0 if self.config.stream == "both" and len(micro.inputs) == 1 else 1.0

    def _run(self, call: BlockCall, hidden: Tensor) -> Tensor:
        if hidden.dtype == torch.float32:
            return call(self.student, hidden)
        working = {name: parameter.to(hidden.dtype) for name, parameter in self.student.named_parameters()}

        def forward(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(self.student, working, args, kwargs)

        return call(forward, hidden)

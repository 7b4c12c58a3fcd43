"""One block that learns: fp32 master weights, an optimiser, one step at a time."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lillama.distill.compile import Compiled
from lillama.distill.config import OptimConfig
from lillama.distill.objective import MicroBatch, Objective, record_outputs
from lillama.stream.calls import BlockArgs

NO_SCALE = 1e-3  # of the usual root mean square: a tensor below has no scale of its own


class Learner:
    """A student block under training.

    The student's parameters are fp32 masters, and so is the optimiser's state. When activations come in another type, the
    block computes with copies of the masters in that type, as the finished model will, and gradients flow into the masters.
    The block stays in evaluation mode: dropout would only blur the target.

    Args:
        student: the block; its parameters become fp32 and trainable.
        optim: the optimiser and its rate.
        lr: peak learning rate.
        steps: optimiser steps in all.
        objective: what the student minimises; None where gradients come from elsewhere, and only `update` is called.
        trained: names of the parameters that learn; None lets all of them.
        compiled: sequences of the micro-batches for which `torch.compile` makes code; 0 for none. Others, and all that is
            computed without gradients, run as they are: each size would need a warm-up of its own.
    """

    def __init__(
        self,
        student: nn.Module,
        optim: OptimConfig,
        lr: float,
        steps: int,
        objective: Objective | None = None,
        trained: Collection[str] | None = None,
        compiled: int = 0,
    ) -> None:
        self.student = student.float().eval()
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(trained is None or name in trained)
        self.optim, self.lr, self.steps, self.objective = optim, lr, steps, objective
        self.step_count = 0
        self.compiled, self._fast = compiled, Compiled(self.student) if compiled else self.student
        self.optimiser = torch.optim.AdamW(
            rate_groups(self.student, optim), lr=lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
        )

    def step(self, batch: Iterable[MicroBatch], tokens: int) -> dict[str, Tensor]:
        """Take one optimiser step on the sum of the streams' losses, averaged over the batch's real tokens.

        Args:
            batch: one micro-batch after the other; each may be forgotten when the next is asked for.
            tokens: real tokens of all of them.

        Returns:
            stream -> loss before the step, a detached scalar on the device.
        """
        losses: dict[str, Tensor] = {}
        for micro in batch:
            for stream in micro.inputs:
                loss = self._loss(micro, stream) / tokens
                (loss * self._objective.weight(micro)).backward()
                losses[stream] = losses.get(stream, 0) + loss.detach()
        self.update()
        return losses

    def update(self) -> None:
        """Take an optimiser step on the gradient that lies in the parameters, and forget it."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.lr * group["scale"] * self.optim.lr_factor(self.step_count, self.steps)
        if self.optim.clip is not None:
            nn.utils.clip_grad_norm_(self.student.parameters(), self.optim.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.step_count += 1

    def aim(self) -> None:
        """Take the gradient that lies in the parameters into the moments and forget it, without a step."""
        for group in self.optimiser.param_groups:
            group["lr"] = 0.0
        self.optimiser.step()
        self.optimiser.zero_grad()

    @torch.no_grad()
    def move(self, lr: float) -> None:
        """Go so far along the first step of Adam, which `aim` prepared; a negative rate goes back."""
        for group in self.optimiser.param_groups:
            for parameter in group["params"]:
                if parameter in self.optimiser.state:
                    parameter.sub_(self.optimiser.state[parameter]["exp_avg"].sign(), alpha=lr * group["scale"])

    def with_lr(self, lr: float) -> "Learner":
        """Return a learner of the same student at another rate, with a fresh optimiser."""
        trained = [name for name, parameter in self.student.named_parameters() if parameter.requires_grad]
        again = Learner(self.student, self.optim, lr, self.steps, self.objective, trained)
        for new, old in zip(again.optimiser.param_groups, self.optimiser.param_groups, strict=True):
            new["scale"] = old["scale"]
        again.compiled, again._fast = self.compiled, self._fast  # the student is the same
        return again

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
    def forward(self, call: BlockArgs, hidden: Float[Tensor, "sequences length width"]) -> Tensor:
        """Run the student as it is now."""
        return self.run(call, hidden)

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
        with record_outputs(self.student, micro.parts) as parts:
            run = self.uncompiled if micro.parts else self.run  # hooks that come and go would be compiled each time
            output = run(micro.call_of(stream), micro.inputs[stream])
        losses = self._objective.token_losses(micro, stream, output, parts)
        return (losses if micro.mask is None else losses.masked_fill(~micro.mask, 0)).sum()

    @property
    def _objective(self) -> Objective:
        assert self.objective is not None  # whoever has none calls `update` alone
        return self.objective

    def run(self, call: BlockArgs, hidden: Float[Tensor, "sequences length width"]) -> Tensor:
        """Run the student in the type of `hidden`, as the finished model will; gradients flow into the masters."""
        repeated = len(hidden) == self.compiled and torch.is_grad_enabled()
        return _run(self._fast if repeated else self.student, call, hidden)

    def uncompiled(self, call: BlockArgs, hidden: Float[Tensor, "sequences length width"]) -> Tensor:
        """Do as `run`, without the help of `torch.compile`."""
        return _run(self.student, call, hidden)


def _run(student: nn.Module, call: BlockArgs, hidden: Float[Tensor, "sequences length width"]) -> Tensor:
    if hidden.dtype == torch.float32:
        return call(student, hidden)
    working = {name: parameter.to(hidden.dtype) for name, parameter in student.named_parameters()}

    def forward(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(student, working, args, kwargs)

    return call(forward, hidden)


def rate_groups(student: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Return the groups of AdamW; the rate of each is multiplied by its `scale`.

    By `rms` each tensor is a group, its scale the root mean square of its values as they are now. Tensors of zeros, as
    biases often begin, take the median of the others.
    """
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if optim.lr_scale == "width":
        return [{"params": parameters, "scale": 1.0}]
    scales = torch.stack([parameter.detach().square().mean().sqrt() for parameter in parameters]).cpu()
    usual = scales[scales > 0].median() if scales.any() else torch.tensor(1.0)
    scales = torch.where(scales > NO_SCALE * usual, scales, usual)
    return [{"params": [p], "scale": scale} for p, scale in zip(parameters, scales.tolist(), strict=True)]

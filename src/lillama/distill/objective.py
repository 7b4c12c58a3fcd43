"""What is asked of a student: the teacher's output and, where a recipe wants it, more than that."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lillama.distill.config import DistillConfig
from lillama.distill.losses import Loss, length_error
from lillama.stream.calls import BlockArgs, hidden_of


@dataclass(frozen=True)
class LookAhead:
    """The next block, through which a student's output is looked at.

    Attributes:
        block: the teacher's next block, frozen.
        call: what it is given besides its hidden state.
        target: what it makes of the teacher's own activations.
    """

    block: nn.Module
    call: BlockArgs
    target: Float[Tensor, "sequences length width"]


@dataclass(frozen=True)
class MicroBatch:
    """A few sequences at one block.

    Attributes:
        call: what the block is given besides its hidden state.
        inputs: stream (`teacher` or `student`) -> hidden states that enter the student.
        target: the teacher's output for the teacher's input.
        mask: true at real tokens; None if all are.
        tokens: number of real tokens, counted on the host.
        own_target: what the student's stream is compared with, if it is not `target`.
        parts: child of the block -> the teacher's output of that child.
        ahead: the next block; None if it is not looked at.
        own_call: what the block is given in the student's stream; None if the same.
    """

    call: BlockArgs
    inputs: Mapping[str, Float[Tensor, "sequences length width"]]
    target: Float[Tensor, "sequences length width"]
    mask: Bool[Tensor, "sequences length"] | None
    tokens: int
    own_target: Float[Tensor, "sequences length width"] | None = None
    parts: Mapping[str, Float[Tensor, "sequences length _"]] = field(default_factory=dict)
    ahead: LookAhead | None = None
    own_call: BlockArgs | None = None

    def call_of(self, stream: str) -> BlockArgs:
        """Return how the block is called in a stream."""
        return self.own_call if stream == "student" and self.own_call is not None else self.call

    def target_of(self, stream: str) -> Float[Tensor, "sequences length width"]:
        """Return what the output of a stream is compared with."""
        return self.own_target if stream == "student" and self.own_target is not None else self.target

    def real(self, target: Float[Tensor, "sequences length _"]) -> Float[Tensor, "tokens _"]:
        """Return a target at the real tokens."""
        return target.flatten(0, 1) if self.mask is None else target[self.mask]


@dataclass(frozen=True)
class LossScale:
    """Loss normalisers, such as the teacher's mean square: each loss begins near 1 whatever the size of the activations.

    Attributes:
        output: for the block's output.
        ahead: for the next block's output.
        parts: for the outputs of the block's children.
    """

    output: float = 1.0
    ahead: float = 1.0
    parts: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, loss: Loss, batches: Iterable[MicroBatch]) -> "LossScale":
        """Return the normalisers of a loss on the real tokens of some micro-batches."""
        outputs, aheads, parts, tokens = 0.0, 0.0, dict[str, float](), 0
        for micro in batches:
            if micro.tokens:
                tokens += micro.tokens
                outputs += micro.tokens * loss.scale(micro.real(micro.target))
                aheads += micro.tokens * (loss.scale(micro.real(micro.ahead.target)) if micro.ahead else 1.0)
                for name, target in micro.parts.items():
                    parts[name] = parts.get(name, 0.0) + micro.tokens * loss.scale(micro.real(target))
        return cls(outputs / tokens, aheads / tokens, {name: scale / tokens for name, scale in parts.items()})


@dataclass(frozen=True)
class Objective:
    """What a student minimises at every token.

    Attributes:
        config: names the loss, the streams, and the weights of what is asked for beside the block's output.
        scale: that each of its losses is divided by.
    """

    config: DistillConfig
    scale: LossScale = field(default_factory=LossScale)

    def token_losses(
        self,
        micro: MicroBatch,
        stream: str,
        output: Float[Tensor, "sequences length width"],
        parts: Mapping[str, Float[Tensor, "..."]],
    ) -> Float[Tensor, "sequences length"]:
        """Return the loss of each token: of the block's output, and of all else that the configuration gives a weight.

        Args:
            micro: the sequences.
            stream: whose activations the student was given.
            output: the student's output.
            parts: child of the block -> the student's output of that child; those that `micro` has targets for.
        """
        config, scale, target = self.config, self.scale, micro.target_of(stream)
        losses = _distance(config.loss, output, target, scale.output)
        if config.norm:
            losses = losses + config.norm * length_error(output.float(), target.float())
        if micro.ahead is not None:
            seen = micro.ahead.call(micro.ahead.block, output)
            losses = losses + config.look_ahead * _distance(config.loss, seen, micro.ahead.target, scale.ahead)
        for name, wanted in micro.parts.items():
            weight, found = config.sub_blocks / len(micro.parts), parts[name].reshape(wanted.shape)
            losses = losses + weight * _distance(config.loss, found, wanted, scale.parts[name])
        return losses

    def weight(self, micro: MicroBatch) -> float:
        """Return how often a stream counts: twice where both are wanted, but the student's is still the teacher's."""
        return 2.0 if self.config.stream == "both" and len(micro.inputs) == 1 else 1.0


def sub_blocks(linears: Iterable[str]) -> tuple[str, ...]:
    """Return the children of a block that hold the named linears, in order.

    Examples:
        >>> sub_blocks(["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"])
        ('self_attn', 'mlp')
    """
    return tuple(dict.fromkeys(name.partition(".")[0] for name in linears))


@contextmanager
def record_outputs(block: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect what the named children of a block return while it runs."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, args: object, output: object) -> None:
            outputs[name] = hidden_of(output)

        return hook

    hooks = [block.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def real_tokens(mask: Bool[Tensor, "_ _"] | None, rows: Int[Tensor, " n"], length: int) -> int:
    """Return the number of real tokens in some sequences; the mask lies on the host, so that no device is waited for."""
    return len(rows) * length if mask is None else int(torch.count_nonzero(mask[rows]))


def _distance(
    loss: Loss, student: Float[Tensor, "*batch width"], teacher: Float[Tensor, "*batch width"], scale: float
) -> Float[Tensor, "*batch"]:
    return loss(student.float(), teacher.float()) / scale

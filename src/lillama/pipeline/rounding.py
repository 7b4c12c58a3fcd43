"""Weights of few bits: what each linear would lose by them, and the rounding, each block for what the rounded ones give it."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from lillama.distill.activations import BlockActivations
from lillama.lowrank.gram import Gram, Moments
from lillama.lowrank.rounding import ROUNDED_TOKENS, Feedback, Rounded, dense_gram, refit, round_weight, rounding_rises
from lillama.lowrank.storage import BITS
from lillama.lowrank.student import load_student
from lillama.modeling.linear import LowRankLinear
from lillama.modeling.quantized import QuantizedLinear
from lillama.pipeline.context import RunContext
from lillama.ranks.spectra import Values
from lillama.stream.capture import advance
from lillama.system.progress import Progress
from lillama.system.resources import trim_memory


def measure_rounding(teacher: nn.Module, measured: Mapping[str, Moments], group_size: int) -> dict[str, Values]:
    """Return, for linears of a block by their names within it, what each width of `BITS` is predicted to lose.

    Args:
        teacher: the block with its weights.
        measured: name of a linear within the block -> both its moments.
        group_size: neighbours in a row that share a scale.
    """
    feedbacks, found = _Feedbacks(), dict[str, Values]()
    for name, moments in measured.items():
        weight = teacher.get_parameter(f"{name}.weight").detach()
        assert moments.inputs is not None
        rounded = round_weight(weight, feedbacks.of(moments.inputs), BITS, group_size)
        rises = rounding_rises(weight, [rounded[bits] for bits in BITS], moments)
        found[name] = torch.tensor(rises, dtype=torch.float64).numpy()
    return found


@torch.no_grad()
def round_blocks(ctx: RunContext) -> None:
    """Round the weights of few bits with feedback, and write what is stored; blocks that the run folder has are done.

    Each block is rounded for what it is given by the rounded blocks before it. What is rounded to the nearest instead (see
    `RankPlan.rounded_within`), is so when it is written.
    """
    plan = ctx.job.plan
    todo = {block.index: bits for block in plan.spec if (bits := plan.rounded_within(block))}
    if all(ctx.run_dir.has_rounded(index) for index in todo):
        return
    model, last, placement = ctx.teacher, max(todo), ctx.placement()
    batch = ctx.local_batch[ctx.local_rows.train[: max(1, ROUNDED_TOKENS // ctx.job.recipe.calibration.seq_len)]]
    activations = BlockActivations.at(0, model, batch, placement, False, ctx.job.micro_batch)
    for index in range(last + 1):
        ctx.report(Progress("rounding", index, last + 1, model.names[index]))
        if (stack := model.stack_of(index)) and index == model.indices(stack).start:
            activations = activations.enter_stack(model, batch, placement, stack)
        block = _read_block(ctx, index)
        if index in todo:
            _round_block(ctx, index, block, todo[index], activations)
        advance(block, index, activations.calls, activations.teacher, activations.teacher, ctx.job.micro_batch)
        trim_memory()
    ctx.report(Progress("rounding", last + 1, last + 1))
    activations.remove()


class _Feedbacks:
    """Feedbacks by the Gram that they are for: linears that are given the same tensor share one."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Gram, Feedback]] = {}

    def of(self, gram: Gram) -> Feedback:
        """Return the feedback for inputs of a Gram."""
        if id(gram) not in self._known:
            self._known[id(gram)] = gram, Feedback.of(dense_gram(gram))
        return self._known[id(gram)][1]


def _read_block(ctx: RunContext, index: int) -> nn.Module:
    """Return a block as it is before it is rounded."""
    block = ctx.job.plan.spec.blocks[index]
    if not ctx.changes(block):
        return ctx.teacher.block(index)
    return load_student(
        ctx.template(block), ctx.ranks(block), ctx.last_state(block), ctx.teacher.device, ctx.teacher.dtype
    )


def _round_block(
    ctx: RunContext, index: int, block: nn.Module, bits: Mapping[str, int], activations: BlockActivations
) -> None:
    """Round some linears of a block in place, and write what is stored of them."""
    group_size = ctx.job.plan.storage.group_size
    if ctx.run_dir.has_rounded(index):
        _take_integers(block, ctx.run_dir.load_rounded(index), bits, group_size)
        return
    grams, feedbacks, stored = activations.compute_target(index, block, linears=bits), _Feedbacks(), dict[str, Tensor]()
    for name, few in bits.items():
        for inner, rounded in _round_linear(block.get_submodule(name), grams[name], few, group_size, feedbacks).items():
            stored |= {f"{name}.{inner}.{leaf}": tensor for leaf, tensor in rounded.stored().items()}
    ctx.run_dir.save_rounded(index, stored, bits)


def _round_linear(
    layer: nn.Module, gram: Gram, bits: int, group_size: int, feedbacks: _Feedbacks
) -> dict[str, Rounded]:
    """Round a linear in place; return name of each stored matrix -> what is stored of it.

    Of two factors the right one is rounded first; the left one is then fitted anew to what comes out of it.
    """
    feedback = feedbacks.of(gram)
    if not isinstance(layer, LowRankLinear):
        weight = cast(nn.Linear, layer).weight
        right = round_weight(weight, feedback, (bits,), group_size)[bits]
        weight.copy_(right.weight)
        return {"right": right}
    before, after = layer.right.weight.double(), layer.left.weight.double()
    right = round_weight(layer.right.weight, feedback, (bits,), group_size)[bits]
    inputs, rounded = dense_gram(gram).to(before), right.weight.double()
    inner = rounded @ inputs @ rounded.T
    fitted = refit(after, before @ inputs @ rounded.T, inner)
    left = round_weight(fitted, Feedback.of(inner), (bits,), group_size)[bits]
    layer.right.weight.copy_(right.weight)
    layer.left.weight.copy_(left.weight)
    return {"left": left, "right": right}


def _take_integers(block: nn.Module, stored: Mapping[str, Tensor], bits: Mapping[str, int], group_size: int) -> None:
    """Give linears of a block the weights that were stored of them, in place."""
    for name, few in bits.items():
        layer = block.get_submodule(name)
        sides = {"left": layer.left, "right": layer.right} if isinstance(layer, LowRankLinear) else {"right": layer}
        for side, own in sides.items():
            weight = cast(nn.Linear, own).weight
            known = QuantizedLinear(weight.shape[1], weight.shape[0], few, group_size)
            known.load_state_dict({leaf: stored[f"{name}.{side}.{leaf}"].cpu() for leaf in ("qweight", "scale")})
            weight.copy_(known.weight)

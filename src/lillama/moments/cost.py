"""What it costs to measure second moments at the linears, from shapes alone."""

from collections.abc import Iterable

from lillama.lowrank.cost import (
    decomposition_bytes,
    elimination_bytes,
    elimination_flops,
    factor_flops,
    rounding_flops,
)
from lillama.lowrank.gram import TILE, WIDEST, gram_size
from lillama.lowrank.rounding import ROUNDED_TOKENS
from lillama.lowrank.storage import BITS
from lillama.model.spec import BlockSpec, LinearSpec
from lillama.model.work import BlockWork, StageCost, Work
from lillama.moments.gradients import PROBED_TOKENS
from lillama.stream.head import head_bytes


def gradients_cost(work: Work, spectra: bool) -> StageCost:
    """Return what a forward and a backward pass through the original cost.

    Args:
        work: to be done.
        spectra: whether the spectra of all linears are measured on the way.
    """
    flops = 6 * work.active_params + 4 * work.head_params  # forward, and forward again in the backward pass
    if spectra:
        flops += sum(moment_flops(block) for block in work.spec)
    return StageCost(
        memory=max(*(measuring_bytes(block, work) for block in work.trained or work.blocks), head_bytes(work)),
        activations=work.activation_bytes((len(work.spec.blocks) + 2) * probed_tokens(work)),
        flops=probed_tokens(work) * flops + (_spectra_flops(work) if spectra else 0),
    )


def _spectra_flops(work: Work) -> float:
    if work.mixes:
        return sum(rounding_flops(linear, len(BITS)) for linear in work.spec.linears)
    narrowing = sum(elimination_flops(ffn.neurons) for ffn in work.spec.ffns) if work.narrows else 0.0
    return sum(map(factor_flops, work.spec.linears)) + narrowing


def rounding_cost(work: Work) -> StageCost:
    """Return what it costs to round weights block by block, each for what the rounded blocks before it give."""
    tokens = min(work.tokens, ROUNDED_TOKENS)
    moments = sum(input_moment_flops(block) for block in work.spec)
    return StageCost(
        memory=max(measuring_bytes(block, work) for block in work.blocks),
        activations=work.activation_bytes(2 * tokens),
        flops=tokens * (2 * 2 * work.active_params + moments)
        + sum(rounding_flops(linear, 1) for linear in work.spec.linears if linear.name in work.rounded),
    )


def probed_tokens(work: Work) -> int:
    """Return the tokens on which gradients are measured."""
    return min(work.tokens, PROBED_TOKENS) if work.gradients else 0


def moments_fit(blocks: Iterable[BlockSpec], room: int) -> bool:
    """Tell whether the moments at all linears fit in so many bytes."""
    linears = (linear for block in blocks for linear in block.linears)
    return sum(8 * (gram_size(linear.in_features) + _held_at_outputs(linear)) for linear in linears) <= room


def measuring_bytes(block: BlockWork, work: Work) -> int:
    """Return the bytes that a block of the original takes while its moments are measured and its linears decomposed."""
    grams = sum(gram_size(width) for width, _ in _input_widths(block.spec))
    gradients = sum(map(_held_at_outputs, block.spec.linears)) if work.gradients else 0
    moments = 8 * (grams + gradients) + decomposition_bytes(block.spec)
    neurons = max((ffn.neurons for ffn in block.spec.ffns), default=0) if work.narrows else 0
    return block.spec.params * work.itemsize + moments + max(work.graph_bytes(block), elimination_bytes(neurons))


def input_moment_flops(block: BlockSpec) -> float:
    """Return the operations a token costs in the Grams of the inputs of a block's linears."""
    return _gram_flops(_input_widths(block))


def moment_flops(block: BlockSpec) -> float:
    """Return the operations a token costs in the Grams at both sides of all linears of a block."""
    wide = ((linear.out_features, linear.share) for linear in block.linears if linear.out_features <= WIDEST)
    return _gram_flops([*_input_widths(block), *wide])


def repeated_flops(block: BlockSpec) -> float:
    """Return the operations a token costs where the moments at a block's linears are computed again."""
    return 4 * block.active_params + moment_flops(block)


def _gram_flops(widths: Iterable[tuple[int, float]]) -> float:
    """Return the operations a token costs in Grams of widths that a share of the tokens comes to; see `Gram.add`."""
    return sum(share * width * (width + min(TILE, width)) for width, share in widths)  # tiles on and above the diagonal


def _held_at_outputs(linear: LinearSpec) -> int:
    """Return the numbers in the Gram of the gradients at a linear's outputs."""
    return gram_size(linear.out_features, WIDEST)


def _input_widths(block: BlockSpec) -> list[tuple[int, float]]:
    """Return the width of each Gram of inputs, and the share of the tokens that comes to it.

    Linears of one module that are equally wide are taken to share their inputs.
    """
    found = {(x.name.rpartition(".")[0], x.in_features): (x.in_features, x.share) for x in block.linears}
    return list(found.values())

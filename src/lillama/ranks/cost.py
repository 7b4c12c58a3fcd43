"""What it costs to compare rank plans, from shapes alone."""

from lillama.lowrank.cost import factor_flops
from lillama.model.work import StageCost, Work
from lillama.moments.cost import measuring_bytes, probed_tokens, repeated_flops
from lillama.stream.head import head_bytes


def comparison_cost(work: Work, plans: int) -> StageCost:
    """Return what it costs to run the original and the initial students by so many plans over the held-out tokens."""
    streams = work.active_params + plans * sum(block.active_params for block in work.blocks)
    probed = 2 * work.active_params
    if not work.moments_kept:
        probed += sum(repeated_flops(block.spec) for block in work.trained)
    return StageCost(
        memory=max(*(measuring_bytes(block, work) for block in work.trained), head_bytes(work)),
        activations=work.activation_bytes(
            (len(work.spec.blocks) + 1) * probed_tokens(work) + (1 + plans) * work.held_out
        ),
        flops=work.held_out * (2 * streams + (1 + plans) * 4 * work.head_params)
        + probed_tokens(work) * probed
        + sum(factor_flops(linear) for block in work.trained for linear in block.spec.linears),
    )

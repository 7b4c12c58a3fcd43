"""What a compression will need: memory, disk and time, from shapes alone."""

import time
from dataclasses import dataclass

import torch

from lillama.distill.fisher import PROBED_TOKENS
from lillama.lowrank.factors import TILE
from lillama.model.spec import BlockSpec, LinearSpec
from lillama.ranks.plan import RankPlan
from lillama.recipe import Recipe

TRIAL_SIZE, TRIAL_SECONDS = 1024, 0.2
EFFICIENCY = 0.6  # of the measured matmul rate that a training step is assumed to reach
JOINT_BYTES = (
    36  # a parameter in the files of the joint schedule: initial state, and two snapshots while one replaces the other
)
MASTER_BYTES = 20  # a parameter under training in fp32: itself, gradient, two moments, best state


@dataclass(frozen=True)
class Estimate:
    """What a compression will need.

    Attributes:
        memory_bytes: peak on the device, without activations between blocks.
        activation_bytes: activations between blocks, in memory or on disk.
        disk_bytes: result and run folder.
        flops: floating-point operations.
        seconds: at the matmul rate measured just now, None if it was not asked for.
    """

    memory_bytes: int
    activation_bytes: int
    disk_bytes: int
    flops: int
    seconds: float | None


def estimate(plan: RankPlan, recipe: Recipe, itemsize: int, micro_batch: int, rate: float | None = None) -> Estimate:
    """Estimate what a compression by this plan will need.

    Args:
        plan: ranks of the model's linears.
        recipe: what is computed.
        itemsize: bytes of a weight or activation in memory.
        micro_batch: sequences that are computed at once.
        rate: floating-point operations a second, from `matmul_rate`.
    """
    spec, tokens, config = plan.spec, recipe.calibration.tokens, recipe.distill
    joint = config.schedule == "joint"
    own_stream = not joint and config.stream != "teacher"
    trained = [block for block in spec if plan.within(block)]
    run = spec.blocks[: max((block.index for block in trained), default=-1) + 1]  # those above need not run
    kept = sum(_kept(block, plan) for block in trained)
    memory = [_memory(block, plan, recipe, itemsize, micro_batch) for block in trained]
    fed = 2 if config.stream == "both" else 1
    forward = sum(2 * block.params + own_stream * 2 * _kept(block, plan) for block in run)
    adapted = sum(2 * block.params for block in trained) if config.adaptive else 0
    ahead = max(block.params for block in spec) if config.look_ahead else 0  # forth and back, its weights are frozen
    training = sum((3 * 2 * _kept(block, plan) + 4 * ahead) * fed * config.epochs for block in trained)
    flops = tokens * (forward + adapted + training) + sum(_initial_flops(block, recipe) for block in trained)
    probed = min(tokens, PROBED_TOKENS) if recipe.init.needs_gradient else 0
    flops += probed * 6 * sum(block.params for block in spec)  # forth, and forth again on the way back
    stores = (3 if own_stream else 2) + bool(config.look_ahead) + bool(config.adaptive)
    parts = max((len(_children(block)) for block in trained), default=0) if config.sub_blocks else 0
    return Estimate(
        memory_bytes=(sum(memory) if joint else max(memory, default=0)) + ahead * itemsize,
        activation_bytes=((stores + parts) * tokens + (len(spec.blocks) + 2) * probed) * spec.hidden_size * itemsize,
        disk_bytes=plan.kept_bytes + kept * (spec.bytes_per_param + (JOINT_BYTES if joint else 0)),
        flops=flops,
        seconds=None if rate is None else flops / (EFFICIENCY * rate),
    )


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure floating-point operations a second of square matrix products, for about 0.2 s."""
    a = torch.randn(TRIAL_SIZE, TRIAL_SIZE, device=device).to(dtype)
    (a @ a).sum().item()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < TRIAL_SECONDS:
        (a @ a).sum().item()
        count += 1
    return 2 * TRIAL_SIZE**3 * count / (time.perf_counter() - start)


def _memory(block: BlockSpec, plan: RankPlan, recipe: Recipe, itemsize: int, micro_batch: int) -> int:
    """Return the bytes of teacher, student under training, Grams and one micro-batch's activations of a block."""
    grams = sum(width**2 for width in _gram_widths(block))
    gradients = sum(linear.out_features**2 for linear in block.linears) if recipe.init.needs_gradient else 0
    widths = sum(linear.in_features + 2 * linear.out_features + (plan[linear.name] or 0) for linear in block.linears)
    activations = micro_batch * recipe.calibration.seq_len * widths * itemsize
    return block.params * itemsize + _kept(block, plan) * MASTER_BYTES + 8 * (grams + gradients) + activations


def _kept(block: BlockSpec, plan: RankPlan) -> int:
    return block.params - sum(linear.params - linear.params_at(plan[linear.name]) for linear in block.linears)


def _initial_flops(block: BlockSpec, recipe: Recipe) -> int:
    """Return the operations of a block's initialisation; its inputs come with the teacher's own forward pass."""
    tokens, init = recipe.calibration.tokens, recipe.init
    flops = sum(map(_factor_flops, block.linears))
    if init.needs_gram:
        flops += tokens * sum(map(_gram_flops, _gram_widths(block)))
    if init.needs_gradient:
        widths = [*_gram_widths(block), *(linear.out_features for linear in block.linears)]
        flops += min(tokens, PROBED_TOKENS) * (4 * block.params + sum(map(_gram_flops, widths)))
    return flops


def _gram_flops(width: int) -> int:
    """Return the operations a token costs in a Gram: tiles on and above the diagonal, see `Gram.add`."""
    return width * (width + min(TILE, width))


def _factor_flops(linear: LinearSpec) -> int:
    """Return about how many fp32 operations take as long as the fp64 decompositions and products of a linear."""
    least, most = sorted((linear.in_features, linear.out_features))
    return least**2 * (44 * least + 8 * most)


def _gram_widths(block: BlockSpec) -> list[int]:
    """Return the width of each Gram; linears of one module that are equally wide are taken to share their inputs."""
    return [width for _, width in {(linear.name.rpartition(".")[0], linear.in_features) for linear in block.linears}]


def _children(block: BlockSpec) -> set[str]:
    """Return the children of a block that hold linears."""
    return {linear.name.removeprefix(f"{block.name}.").partition(".")[0] for linear in block.linears}

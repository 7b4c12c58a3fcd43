"""What a compression will need: memory, disk and time, from shapes alone."""

import time
from dataclasses import dataclass

import torch

from lillama.model.spec import BlockSpec
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
    memory = [_memory(block, plan, itemsize, micro_batch * recipe.calibration.seq_len) for block in trained]
    fed = 2 if config.stream == "both" else 1
    forward = sum(2 * block.params + own_stream * 2 * _kept(block, plan) for block in run)
    training = sum(2 * _kept(block, plan) * 3 * fed * config.epochs for block in trained)
    grams = sum(map(_gram_flops, trained)) if recipe.init.needs_gram else 0
    flops = tokens * (forward + training + grams)
    return Estimate(
        memory_bytes=sum(memory) if joint else max(memory, default=0),
        activation_bytes=(3 if own_stream else 2) * tokens * spec.hidden_size * itemsize,
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


def _memory(block: BlockSpec, plan: RankPlan, itemsize: int, micro_tokens: int) -> int:
    """Return the bytes of teacher, student under training, Grams and one micro-batch's activations of a block."""
    grams = 8 * sum(_gram_sizes(block))
    widths = sum(linear.in_features + 2 * linear.out_features + (plan[linear.name] or 0) for linear in block.linears)
    return block.params * itemsize + _kept(block, plan) * MASTER_BYTES + grams + micro_tokens * widths * itemsize


def _kept(block: BlockSpec, plan: RankPlan) -> int:
    return block.params - sum(linear.params - linear.params_at(plan[linear.name]) for linear in block.linears)


def _gram_flops(block: BlockSpec) -> int:
    """Return the operations a token costs: a forward pass, and one product for each Gram."""
    return 2 * block.params + 2 * sum(_gram_sizes(block))


def _gram_sizes(block: BlockSpec) -> list[int]:
    """Return the numbers in each Gram; linears of one module that are equally wide are taken to share their inputs."""
    shared = {(linear.name.rpartition(".")[0], linear.in_features) for linear in block.linears}
    return [width**2 for _, width in shared]

"""What distillation costs, block by block or in all blocks at once, from shapes alone."""

from lillama.distill.config import DistillConfig
from lillama.lowrank.cost import factor_flops
from lillama.lowrank.initialisers import Initialiser
from lillama.model.spec import BlockSpec
from lillama.model.work import BlockWork, StageCost, Work
from lillama.moments.cost import input_moment_flops, measuring_bytes, probed_tokens, repeated_flops

LEARNER_BYTES = 16  # a parameter under training in fp32: itself, gradient, two moments
TRAINED_BYTES = LEARNER_BYTES + 4  # and in the best state
BLOCK_BYTES = 32  # a parameter of the block that is taught in a sequential schedule, in two snapshots
# A parameter in the files of the joint schedule: two snapshots of 12 or 16 bytes while one replaces the other, and the initial
# state, which may find no room in memory.
JOINT_BYTES = 36


def distillation_cost(work: Work, config: DistillConfig, last_epochs: int, init: Initialiser) -> StageCost:
    """Return what the blocks' initialisation and training cost.

    Args:
        work: to be done.
        config: how blocks are taught.
        last_epochs: those of `config`, or none, in the last stack.
        init: computes the factors.
    """
    spec, tokens, trained = work.spec, work.tokens, work.trained
    joint = config.schedule == "joint"
    own_stream = not joint and config.stream != "teacher"
    run = work.blocks[: trained[-1].spec.index + 1]  # those above need not run
    memory = [training_bytes(block, work) for block in trained]
    kept = [block.kept_params for block in trained]
    fed = 2 if config.stream == "both" else 1
    forward = sum(2 * block.spec.active_params + own_stream * 2 * block.active_params for block in run)
    adapted = sum(2 * block.spec.active_params for block in trained) if config.adaptive else 0
    ahead = max(block.params for block in spec) if config.look_ahead else 0
    # Forward and backward through the next block, without its weights.
    further = 4 * max(block.active_params for block in spec) if config.look_ahead else 0
    epochs = {block.spec.stack: config.epochs for block in trained} | {work.spec.blocks[-1].stack: last_epochs}
    training = sum((3 * 2 * block.active_params + further) * fed * epochs[block.spec.stack] for block in trained)
    stores = (3 if own_stream else 2) + bool(config.look_ahead) + bool(config.adaptive)
    parts = max(len(_children(block.spec)) for block in trained) if config.sub_blocks else 0
    probed = len(spec.blocks) * probed_tokens(work) if init.needs_gradient else 0
    return StageCost(
        memory=(sum(memory) if joint else max(memory)) + ahead * work.itemsize,
        activations=work.activation_bytes((stores + parts) * tokens + probed),
        flops=tokens * (forward + adapted + training)
        + sum(_initial_flops(block.spec, work, init) for block in trained),
        disk=JOINT_BYTES * sum(kept) if joint else BLOCK_BYTES * max(kept),
    )


def training_bytes(block: BlockWork, work: Work) -> int:
    """Return the bytes that measuring and initialising a block take, or its training, whichever is more."""
    return max(measuring_bytes(block, work), block.kept_params * TRAINED_BYTES + work.graph_bytes(block))


def _initial_flops(block: BlockSpec, work: Work, init: Initialiser) -> float:
    """Return the operations of a block's initialisation; its inputs come with the teacher's own forward pass."""
    flops: float = sum(map(factor_flops, block.linears))
    if init.needs_gram:
        flops += work.tokens * input_moment_flops(block)
    if init.needs_gradient and not work.moments_kept:
        flops += probed_tokens(work) * repeated_flops(block)
    return flops


def _children(block: BlockSpec) -> set[str]:
    """Return the children of a block that hold linears."""
    return {linear.name.removeprefix(f"{block.name}.").partition(".")[0] for linear in block.linears}

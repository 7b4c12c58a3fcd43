"""What recovery costs, from shapes alone."""

from lillama.distill.cost import training_bytes
from lillama.model.work import StageCost, Work
from lillama.recovery.config import RecoveryConfig
from lillama.stream.head import head_bytes

# A parameter in files: two snapshots of 12 or 16 bytes while one replaces the other, and the state under training and the best
# one, which may find no room in memory.
SNAPSHOT_BYTES = 48


def recovery_cost(work: Work, config: RecoveryConfig) -> StageCost:
    """Return what recovery costs where graphs find no room, so that every block runs again in the backward pass."""
    first = work.trained[0].spec.index
    chain, trained = work.blocks[first:], {block.spec.index for block in work.trained}
    forward = sum(2 * block.active_params for block in chain)
    back = sum((4 if block.spec.index in trained else 2) * block.active_params for block in chain)
    taught = work.recovered - work.held_out
    seen = config.epochs * taught if config.steps is None else config.steps * config.batch_size * work.seq_len
    learnt = seen * (2 * forward + back + 6 * work.head_params)
    checked = (config.checks + 1) * work.held_out * (forward + 4 * work.head_params)
    return StageCost(
        memory=max(training_bytes(block, work) for block in work.trained) + head_bytes(work),
        activations=work.activation_bytes(2 * work.recovered + len(chain) * config.batch_size * work.seq_len),
        flops=work.recovered * 2 * work.active_params + learnt + checked,
        disk=SNAPSHOT_BYTES * sum(block.kept_params for block in work.trained),
    )

"""Recovery over a whole compressed model, after all its blocks are taught."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lillama.distill.cost import TRAINED_BYTES
from lillama.distill.history import State
from lillama.distill.learner import Learner
from lillama.distill.log import GROWTH
from lillama.distill.pool import LearnerPool
from lillama.distill.spectrum import largest_singular_value
from lillama.distill.split import Batches
from lillama.distill.trainer import SNAPSHOT_SECONDS, Trainer
from lillama.lowrank.student import load_student
from lillama.model.spec import BlockSpec
from lillama.modeling.experts import routers
from lillama.pipeline.context import RunContext
from lillama.pipeline.time_budget import STEPS, with_steps
from lillama.recovery.backprop import Chain, KeptGraphs, Recomputed, graph_bytes
from lillama.recovery.config import RecoveryConfig
from lillama.recovery.log import RecoveryLog
from lillama.recovery.training import ALL, RecoveryData, RecoveryTraining, warn_of_end
from lillama.stream.activations import ActivationStore, StoreFactory
from lillama.stream.calls import BlockInputs
from lillama.stream.capture import advance, begin
from lillama.stream.forward import through
from lillama.stream.head import Head
from lillama.system.progress import Progress
from lillama.system.resources import trim_memory

logger = logging.getLogger(__name__)


def recover(ctx: RunContext, config: RecoveryConfig, snapshot_seconds: float = SNAPSHOT_SECONDS) -> None:
    """Train all compressed blocks together, and write those that are better than before on the held-out sequences.

    In an encoder-decoder these are the blocks of the decoder; the encoder stays as it was taught. Nothing is done if the
    recipe leaves recovery out, it is finished, or no block is compressed. Where the loss rises all blocks go back to their
    best state and on at half the rate. Blocks that stayed dense are left as they are, and so is all outside the blocks.
    """
    last = ctx.teacher.indices(len(ctx.teacher.stacks) - 1)
    trained = {block.index: block for block in ctx.blocks if ctx.changes(block) and block.index in last}
    if config.trains == "routers":
        trained = {index: block for index, block in trained.items() if routers(ctx.teacher.template(index))}
    if not config.wanted or not trained or ctx.run_dir.is_recovered:
        return
    made = [StoreFactory(ctx.placement(), ctx.teacher.dtype, f"recovery-{name}", 2) for name in ("original", "own")]
    begun = time.monotonic()
    calls, inputs, targets = _stream_both(ctx, min(trained), *made)
    forward = (time.monotonic() - begun) / math.prod(inputs.shape[:2])
    head = Head(ctx.teacher, ctx.teacher.outside(head=True), calls)
    data = RecoveryData(ctx.batch, targets, ctx.rows, ctx.job.micro_batch)

    @contextmanager
    def training(config: RecoveryConfig) -> Iterator[RecoveryTraining]:
        boundaries = dict[int, ActivationStore]()
        chain = _chain(ctx, trained, config, calls, inputs, boundaries, ctx.run_dir.scratch / "recovery")
        try:
            yield RecoveryTraining(chain, head, data, config)
        finally:
            for store in boundaries.values():
                store.remove()

    if ctx.deadline is not None:
        if ctx.run_dir.decided(STEPS) is None:
            with training(config) as one:
                step, check = one.time_step()
                per_epoch = len(_batches(ctx, replace(config, epochs=1, steps=None)))
                steps = ctx.deadline.steps(step, check, config.checks, forward, ctx.deadline.most_epochs * per_epoch)
            del one
            ctx.run_dir.decision(STEPS, steps)
            logger.info("recovery: %d steps of %.2g s fit into the time", steps, step)
        config = with_steps(config, ctx.run_dir)
    if config.wanted:
        with training(config) as one:
            trainer = Trainer(
                _batches(ctx, config),
                config.checks,
                ctx.run_dir.recovery_state,
                "recover",
                snapshot_seconds=snapshot_seconds,
            )
            state = trainer.fit(one, ctx.report)
            history = state.histories[ALL]
            lr = one.pool[min(trained)].lr * 2 ** len(history.halved)
        del one
        ctx.let_go()
        warn_of_end(state)
        _save(ctx, trained, RecoveryLog.of(lr, state, history), history.best_states)
    for store in (*made, calls):
        store.remove()
    trim_memory()


def _save(ctx: RunContext, trained: Mapping[int, BlockSpec], log: RecoveryLog, states: Mapping[int, State]) -> None:
    """Write the blocks that are better than before, and the record."""
    grown, seals = dict[str, float](), dict[int, str]()
    for index, state in states.items():
        taught = ctx.run_dir.load_block(index)
        grown |= _grown(trained[index].name, ctx.ranks(trained[index]), taught, state)
        seals[index] = ctx.run_dir.save_recovered(index, taught | state)
    _warn_of_growth(grown)
    ctx.run_dir.finish_recovery(replace(log, grown=grown), seals)


def _grown(
    block: str, linears: Iterable[str], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, float]:
    """Return full name of a linear -> growth of its largest singular value, where that is worth a warning."""
    growth = {f"{block}.{name}": _largest(after, name) / max(_largest(before, name), 1e-30) for name in linears}
    return {name: factor for name, factor in growth.items() if factor > GROWTH}


def _warn_of_growth(grown: Mapping[str, float]) -> None:
    if grown:
        name, factor = max(grown.items(), key=lambda item: item[1])
        logger.warning(
            "recovery: the largest singular value of %d linears grew by more than half, of %s to the %.1f-fold; lower "
            "recover.lr",
            len(grown),
            name,
            factor,
        )


def _largest(state: Mapping[str, Tensor], name: str) -> float:
    return largest_singular_value(state[f"{name}.left.weight"].cpu(), state[f"{name}.right.weight"].cpu())


def _stream_both(
    ctx: RunContext, first: int, targets: StoreFactory, own: StoreFactory
) -> tuple[BlockInputs, ActivationStore, ActivationStore]:
    """Run the original over all sequences, and the compressed model as far as recovery does not reach.

    Args:
        ctx: with finished blocks.
        first: the first block that is trained.
        targets: makes stores for the original's activations.
        own: for those of the compressed model.

    Returns:
        how the last stack's blocks are called in the compressed model, its inputs of block `first`, and the original's
        last outputs.
    """
    model, batch, rate = ctx.teacher, ctx.batch, ctx.job.micro_batch
    total, last = len(model.names), len(model.stacks) - 1

    def visit(index: int) -> None:
        ctx.report(Progress("blocks", index, total, f"original, {model.names[index]}"))

    tables, outputs = through(model, batch, targets, rate, visit)
    ctx.report(Progress("blocks", total, total))
    own_tables, before = through(model, batch, own, rate, block=ctx.current, stacks=last)
    for table in (*tables, *own_tables):
        table.remove()
    calls, inputs = begin(model, batch, own, rate, last, dict(enumerate(before)))
    for index in range(model.indices(last).start, first):
        advance(ctx.current(index), index, calls, inputs, inputs, rate)
    return calls, inputs, outputs[-1]


def _chain(
    ctx: RunContext,
    trained: Mapping[int, BlockSpec],
    config: RecoveryConfig,
    calls: BlockInputs,
    inputs: ActivationStore,
    boundaries: dict[int, ActivationStore],
    scratch: Path,
) -> Chain:
    """Return the blocks under training; `boundaries` is filled where graphs do not fit into memory."""
    blocks = range(min(trained), len(ctx.teacher.names))
    each = TRAINED_BYTES * max(block.params for block in trained.values())
    resident = ctx.job.memory.learners(each)
    compiled = ctx.compiled(config.batch_size, "recovery", resident >= len(trained))
    pool = LearnerPool(_learners(ctx, config, compiled), scratch, resident)
    room = ctx.job.memory.graphs(each * len(trained))
    if resident < len(trained) or _graph_bytes(ctx, pool, blocks, config, calls, inputs) > room:
        placement, shape = ctx.placement(), (config.batch_size, *inputs.shape[1:])
        place = placement.place(len(blocks) * math.prod(shape) * inputs.dtype.itemsize)
        boundaries |= {
            index: ActivationStore(shape, inputs.dtype, placement, place, f"recovery-{index}") for index in blocks
        }
    tape = Recomputed(boundaries) if boundaries else KeptGraphs()
    return Chain(pool, frozenset(trained), _dense_blocks(ctx), blocks, calls, inputs, tape)


def _graph_bytes(
    ctx: RunContext,
    pool: LearnerPool,
    blocks: range,
    config: RecoveryConfig,
    calls: BlockInputs,
    inputs: ActivationStore,
) -> int:
    """Return about what the graphs of all blocks for one batch take in memory."""
    rows = torch.arange(min(config.batch_size, ctx.job.micro_batch, inputs.shape[0]))
    run = partial(pool[blocks[0]].uncompiled, calls.select(blocks[0], rows, inputs.device))
    return graph_bytes(run, inputs.read(rows)) * len(blocks) * math.ceil(config.batch_size / len(rows))


def _learners(ctx: RunContext, config: RecoveryConfig, compiled: int) -> Callable[[int], Learner]:
    """Return a factory of learners of the blocks as distillation left them."""
    steps, specs = len(_batches(ctx, config)), {block.index: block for block in ctx.blocks}

    def learner(index: int) -> Learner:
        template, state = ctx.template(specs[index]), ctx.run_dir.load_block(index)
        ranks, device = ctx.ranks(specs[index]), ctx.teacher.device
        student = load_student(template, ranks, state, device, torch.float32)
        names = routers(student) if config.trains == "routers" else None
        return Learner(student, config.optim, _lr(ctx, config), steps, trained=names, compiled=compiled)

    return learner


def _dense_blocks(ctx: RunContext) -> Callable[[int], nn.Module]:
    """Return a loader of the blocks that are not trained; as many as memory may keep are not read again."""
    model, spec = ctx.teacher, ctx.job.plan.spec
    largest = max(block.params for block in spec) * model.dtype.itemsize
    return lru_cache(ctx.job.memory.kept_blocks(largest))(ctx.current)


def _batches(ctx: RunContext, config: RecoveryConfig) -> Batches:
    if config.steps is not None:
        return Batches.of_steps(ctx.rows.train, config.steps, config.batch_size, ctx.job.recipe.seed)
    return Batches(ctx.rows.train, config.epochs, config.batch_size, ctx.job.recipe.seed)


def _lr(ctx: RunContext, config: RecoveryConfig) -> float:
    return config.optim.peak_lr(ctx.job.plan.spec.hidden_size)

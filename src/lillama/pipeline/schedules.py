"""The two schedules of local distillation over a whole model: block by block, or all blocks on every batch."""

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from lillama.distill.activations import BlockActivations, Earlier
from lillama.distill.block import BlockData, distill_block
from lillama.distill.config import DistillConfig
from lillama.distill.cost import LEARNER_BYTES
from lillama.distill.joint import JointData, JointTraining, distill_stack
from lillama.distill.learner import Learner
from lillama.distill.log import DistillLog
from lillama.distill.objective import LossScale, Objective, sub_blocks
from lillama.distill.pool import LearnerPool
from lillama.distill.split import Batches
from lillama.distill.trainer import SNAPSHOT_SECONDS, Trainer
from lillama.files.artefacts import load_tensors, save_tensors
from lillama.lowrank.gram import Gram, Moments
from lillama.lowrank.student import build_student, load_student, narrow_teacher
from lillama.model.spec import BlockSpec
from lillama.pipeline.context import RunContext
from lillama.pipeline.narrowing import narrow_ffns
from lillama.stream.activations import ActivationStore, StoreFactory
from lillama.stream.forward import through
from lillama.stream.model import StreamedModel
from lillama.system.progress import Progress
from lillama.system.resources import trim_memory

logger = logging.getLogger(__name__)


class Teachers:
    """The teacher's blocks, each read once: the one at work, and the next one, which is read while its forerunner is trained.

    Args:
        model: the teacher.
        ample: whether there is memory for one block more.
    """

    def __init__(self, model: StreamedModel, ample: bool) -> None:
        self.model, self.ample = model, ample
        self._reader = ThreadPoolExecutor(1, "reader")
        self._next: dict[int, Future[nn.Module]] = {}

    def __enter__(self) -> "Teachers":
        return self

    def __exit__(self, *exception: object) -> None:
        self._reader.shutdown(cancel_futures=True)

    def take(self, index: int) -> nn.Module:
        """Return a block, and keep it no longer."""
        return self._next.pop(index).result() if index in self._next else self.model.block(index)

    def expect(self, index: int) -> None:
        """Begin to read a block, if it exists and there is memory for it."""
        if self.ample and index < len(self.model.names):
            self._read(index)

    def after(self, index: int) -> nn.Module | None:
        """Return the block behind one, and keep it for its turn; None behind the last of a stack."""
        if index + 1 == self.model.indices(self.model.stack_of(index)).stop:
            return None
        return self._read(index + 1).result()

    def _read(self, index: int) -> "Future[nn.Module]":
        if index not in self._next:
            self._next[index] = self._reader.submit(self.model.block, index)
        return self._next[index]


def distill_sequentially(ctx: RunContext, snapshot_seconds: float = SNAPSHOT_SECONDS) -> None:
    """Finish one block after the other; both streams of activations move along.

    The state of the block at work is noted every `snapshot_seconds`.
    """
    with Teachers(ctx.teacher, ctx.ample) as teachers:
        for block, activations in _walk(ctx):
            ctx.report(Progress("blocks", block.index, len(ctx.blocks), block.name))
            _finish_block(ctx, block, activations, teachers, snapshot_seconds)
            ctx.let_go()
    ctx.report(Progress("blocks", len(ctx.blocks), len(ctx.blocks)))


def _finish_block(
    ctx: RunContext, block: BlockSpec, activations: BlockActivations, teachers: Teachers, snapshot_seconds: float
) -> None:
    """Finish a block, and move both streams behind it."""
    teacher, changes = teachers.take(block.index), ctx.changes(block)
    untrained = changes and not ctx.run_dir.has_block(block.index)
    grams = _target(ctx, block, teacher, activations, untrained)
    student = None
    if untrained:
        student = initial_student(ctx, block, teacher, grams)
        activations.blend_target(block.index, teacher, ctx.job.recipe.distill.adaptive)
        grams.clear()
        teacher = None
        trim_memory()
        if block is not ctx.blocks[-1]:
            teachers.expect(block.index + 1)
        ctx.save(block, student, _train(ctx, block, student, activations, teachers, snapshot_seconds))
        ctx.run_dir.remove_states()
        student = None
    if changes:
        student = ctx.finished(block)
    elif activations.parted:
        student = teacher
    activations.advance(block.index, student)


def _walk(ctx: RunContext) -> Iterator[tuple[BlockSpec, BlockActivations]]:
    """Yield each block with the streams before it; whoever asks for the next one has moved them on."""
    model, config = ctx.teacher, ctx.job.recipe.distill
    parts = max(len(sub_blocks(ctx.ranks(block))) for block in ctx.blocks) if config.sub_blocks else 0
    further, both = parts + bool(config.look_ahead) + bool(config.adaptive), config.stream != "teacher"
    activations, stack = None, 0
    for block in ctx.blocks:
        if activations is None:
            activations = BlockActivations.at(
                0, model, ctx.local_batch, ctx.placement(), both, ctx.job.micro_batch, further
            )
        elif block.index not in model.indices(stack):
            stack += 1
            activations = activations.enter_stack(model, ctx.local_batch, ctx.placement(), stack, further)
        yield block, activations
    if activations is not None:
        activations.remove()


def _target(
    ctx: RunContext, block: BlockSpec, teacher: nn.Module, activations: BlockActivations, untrained: bool
) -> dict[str, Gram]:
    """Compute the target of a block, and on the way all else that its student will need; return the Grams."""
    recipe, ranks, widths = ctx.job.recipe, ctx.ranks(block), ctx.widths(block)
    parts = sub_blocks(ranks) if untrained and recipe.distill.sub_blocks else ()
    needed = [*(ranks if recipe.init.needs_gram else ()), *widths]
    return activations.compute_target(block.index, teacher, parts, needed if untrained else ())


def initial_student(ctx: RunContext, block: BlockSpec, teacher: nn.Module, grams: Mapping[str, Gram]) -> nn.Module:
    """Return a block's student before training."""
    ranks, init = ctx.ranks(block), ctx.job.recipe.init
    generator = torch.Generator().manual_seed(ctx.seed(block))
    gradients, probed = ctx.gradients, {}
    if gradients is not None:
        probed = gradients.moments(block.index, teacher, ranks, inputs=not grams)
        trim_memory()
    found = {name: Moments(grams.get(name), probed[name].gradients if probed else None) for name in ranks}
    ffns = narrow_ffns(block, ctx.widths(block), ctx.width_curves)
    neurons = {ffn.outward: Moments(grams[ffn.outward]) for ffn in ffns}
    template, teacher = narrow_teacher(ctx.teacher.template(block.index), teacher, ffns, neurons)
    return build_student(template, teacher, ranks, init, found, generator)


def _train(
    ctx: RunContext,
    block: BlockSpec,
    student: nn.Module,
    activations: BlockActivations,
    teachers: Teachers,
    snapshot_seconds: float,
) -> DistillLog:
    config, rows = _config(ctx, ctx.teacher.stack_of(block.index)), ctx.local_rows
    following = teachers.after(block.index) if config.look_ahead else None
    if following is not None:
        activations.compute_next_target(block.index, following)
    data = BlockData(activations, block.index, config.stream, following)
    objective = Objective(config, data.loss_scale(config.loss, rows.held_out))
    folder = ctx.run_dir.block_state(block.index)
    trainer = _trainer(ctx, config, ctx.seed(block), folder, snapshot_seconds)
    compiled = ctx.compiled(config.batch_size, "blocks")
    lr = config.optim.peak_lr(ctx.job.plan.spec.hidden_size)
    learner = Learner(student, config.optim, lr, len(trainer.batches), objective, compiled=compiled)
    return distill_block(learner, block.name, data, rows.held_out, trainer, ctx.report)


def _config(ctx: RunContext, stack: int) -> DistillConfig:
    """Return how the blocks of a stack are taught."""
    return ctx.job.recipe.distill_in(stack == len(ctx.teacher.stacks) - 1)


def _trainer(ctx: RunContext, config: DistillConfig, seed: int, folder: Path, snapshot_seconds: float) -> Trainer:
    batches = Batches(ctx.local_rows.train, config.epochs, config.batch_size, seed)
    return Trainer(batches, config.checks, folder, snapshot_seconds=snapshot_seconds)


def distill_jointly(ctx: RunContext, snapshot_seconds: float = SNAPSHOT_SECONDS) -> None:
    """Let all blocks of a stack take a step on every batch, as published; note the state every `snapshot_seconds`.

    Of an encoder-decoder the encoder is finished first: the decoder is taught on what the finished encoder gives it.
    """
    for stack in range(len(ctx.teacher.stacks)):
        trained = {b.index: b for b in ctx.blocks if ctx.changes(b) and b.index in ctx.teacher.indices(stack)}
        if any(not ctx.run_dir.has_block(index) for index in trained):
            _distill_stack(ctx, stack, trained, snapshot_seconds)
            ctx.let_go()


def _distill_stack(ctx: RunContext, stack: int, trained: Mapping[int, BlockSpec], snapshot_seconds: float) -> None:
    config, before = _config(ctx, stack), _before(ctx, stack)
    initial, scales = _initial_students(ctx, trained, stack, before)
    trainer = _trainer(ctx, config, ctx.job.recipe.seed, ctx.run_dir.joint_state(stack), snapshot_seconds)
    lr, resident = config.optim.peak_lr(ctx.job.plan.spec.hidden_size), _resident(ctx, trained)
    compiled = ctx.compiled(config.batch_size, f"stack {stack}", resident >= len(trained))

    def learner(index: int) -> Learner:
        objective = Objective(config, scales[index])
        return Learner(initial(index), config.optim, lr, len(trainer.batches), objective, compiled=compiled)

    activations = _activations(ctx, stack, before, config.stream != "teacher" and stack > 0)
    training = JointTraining(
        names={index: block.name for index, block in trained.items()},
        last=max(trained),
        teacher=_teacher_blocks(ctx),
        pool=LearnerPool(learner, ctx.run_dir.scratch, resident),
        data=JointData(
            activations.calls,
            activations.teacher,
            activations.mask,
            ctx.job.micro_batch,
            activations.own_calls,
            activations.student,
        ),
        held_out=ctx.local_rows.held_out,
        config=config,
    )
    for index, taught, log in distill_stack(training, trainer, ctx.report):
        ctx.save(trained[index], taught.student, log)
    ctx.run_dir.remove_states()
    activations.remove()


def _before(ctx: RunContext, stack: int) -> Earlier:
    """Return the outputs of the earlier stacks, the teacher's and the student's."""
    model, ends = ctx.teacher, list[list[ActivationStore]]()
    if not stack:
        return {}
    for name, block in (("teacher", None), ("student", ctx.current)):
        new = StoreFactory(ctx.placement(), model.dtype, f"before-{name}", 2)
        tables, outputs = through(model, ctx.local_batch, new, ctx.job.micro_batch, block=block, stacks=stack)
        ends.append(outputs)
        for table in tables:
            table.remove()
    return dict(enumerate(zip(*ends, strict=True)))


def _activations(ctx: RunContext, stack: int, before: Earlier, both: bool) -> BlockActivations:
    return BlockActivations.at(
        stack, ctx.teacher, ctx.local_batch, ctx.placement(), both, ctx.job.micro_batch, before=before
    )


def _initial_students(
    ctx: RunContext, trained: Mapping[int, BlockSpec], stack: int, before: Earlier
) -> tuple[Callable[[int], nn.Module], dict[int, LossScale]]:
    """Compute the student of every block of a stack before training.

    Returns:
        a loader of the initial student of a block, and the loss normalisers by block.
    """
    config, rows, scales = ctx.job.recipe.distill, ctx.local_rows, dict[int, LossScale]()
    activations = _activations(ctx, stack, before, False)
    folder = ctx.run_dir.scratch
    folder.mkdir(exist_ok=True)
    for block in (block for block in ctx.blocks if block.index in ctx.teacher.indices(stack)):
        ctx.report(Progress("blocks", block.index, len(ctx.blocks), block.name))
        teacher = ctx.teacher.block(block.index)
        grams = _target(ctx, block, teacher, activations, block.index in trained)
        if block.index in trained:
            student = initial_student(ctx, block, teacher, grams)
            save_tensors(folder / f"initial-{block.index:04}.safetensors", student.state_dict())
            scales[block.index] = BlockData(activations, block.index, "teacher").loss_scale(config.loss, rows.held_out)
        activations.advance(block.index, None)
    activations.remove(earlier=False)

    def initial(index: int) -> nn.Module:
        state = load_tensors(folder / f"initial-{index:04}.safetensors")
        template, ranks = ctx.template(trained[index]), ctx.ranks(trained[index])
        return load_student(template, ranks, state, ctx.teacher.device, torch.float32)

    return initial, scales


def _teacher_blocks(ctx: RunContext) -> Callable[[int], nn.Module]:
    """Return a loader of the teacher's blocks; the first ones, as many as memory may keep, are read once."""
    teacher, kept = ctx.teacher, dict[int, nn.Module]()
    largest = max(block.params for block in ctx.blocks) * teacher.dtype.itemsize
    room = ctx.job.memory.kept_blocks(largest)

    def block(index: int) -> nn.Module:
        if index in kept:
            return kept[index]
        read = teacher.block(index)
        if index < room:
            kept[index] = read
        return read

    return block


def _resident(ctx: RunContext, trained: Mapping[int, BlockSpec]) -> int:
    """Return how many blocks under training may stay in memory."""
    largest = max(block.params for block in trained.values())
    return ctx.job.memory.learners(LEARNER_BYTES * largest)

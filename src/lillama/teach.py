"""The two schedules of local distillation over a whole model: block by block, or all blocks on every batch."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lillama.calibration.pack import TokenBlocks
from lillama.distill.block import Rows, distill_block, step_total
from lillama.distill.grams import collect_grams
from lillama.distill.joint import SNAPSHOT_SECONDS, Bench, JointData, JointTraining
from lillama.distill.learner import Learner
from lillama.distill.streams import Streams
from lillama.distill.trace import DistillLog
from lillama.lowrank.compressed import compressed_copy, restored_copy
from lillama.model.checkpoint import load_tensors, save_tensors
from lillama.model.spec import BlockSpec
from lillama.prepare import Job
from lillama.progress import Progress, Report
from lillama.resources import free_memory, trim_memory
from lillama.run import RunDir
from lillama.stream.store import Shelf
from lillama.stream.streamed import StreamedModel

logger = logging.getLogger(__name__)

TRAINING_BYTES = 16  # a parameter under training: itself, gradient, two moments


@dataclass(frozen=True)
class Lesson:
    """A job with its calibration tokens and its run folder.

    Attributes:
        job: what is to be done.
        tokens: that it is done with.
        run: where results go.
        report: told about blocks and steps.
    """

    job: Job
    tokens: TokenBlocks
    run: RunDir
    report: Report

    @property
    def teacher(self) -> StreamedModel:
        """The original."""
        return self.job.teacher

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """All blocks up to the last one that is compressed; those above need not run."""
        spec = self.job.plan.spec
        last = max((block.index for block in spec if self.ranks(block)), default=-1)
        return spec.blocks[: last + 1]

    @property
    def unfinished(self) -> tuple[BlockSpec, ...]:
        """The blocks that are to be compressed and are not yet."""
        return tuple(block for block in self.blocks if self.ranks(block) and not self.run.has_block(block.index))

    @property
    def rows(self) -> Rows:
        """Training and held-out sequences."""
        return Rows.split(len(self.tokens.ids), self.job.recipe.distill.held_out, self.job.recipe.seed)

    def ranks(self, block: BlockSpec) -> dict[str, int]:
        """Return name within the block -> rank."""
        return {name.removeprefix(f"{block.name}."): rank for name, rank in self.job.plan.within(block).items()}

    def seed(self, block: BlockSpec) -> int:
        """Return the seed of a block's random choices."""
        return self.job.recipe.seed * 10_007 + block.index

    def save(self, block: BlockSpec, student: nn.Module, log: DistillLog) -> None:
        """Write a finished student in the type that the original is stored in."""
        if not log.improved and log.steps:
            logger.info("%s: training did not improve on the initialisation, which is kept", block.name)
        state = {name: tensor.to(self._stored(block, name)) for name, tensor in student.state_dict().items()}
        self.run.save_block(block.index, state, log)

    def _stored(self, block: BlockSpec, name: str) -> torch.dtype:
        """Return the type in which the original stores a student's tensor, or the weight that a factor stands for."""
        dense = name.removesuffix(".left.weight").removesuffix(".right.weight")
        full = f"{block.name}.{name if dense == name else f'{dense}.weight'}"
        return self.teacher.reader.dtype(self.teacher.names[full])

    def finished(self, block: BlockSpec) -> nn.Module:
        """Return a finished student as it was written, to compute with."""
        template, state = self.teacher.blocks[block.index], self.run.load_block(block.index)
        return restored_copy(template, self.ranks(block), state, self.teacher.device, self.teacher.dtype)

    def shelf(self) -> Shelf:
        """Return where activations go."""
        return Shelf.on(self.teacher.device, self.run.scratch, self.job.machine.activation_memory)


def teach_sequentially(lesson: Lesson) -> None:
    """Finish one block after the other; both streams of activations move along."""
    config = lesson.job.recipe.distill
    both, micro_batch = config.stream != "teacher", lesson.job.micro_batch
    streams = Streams.begun(lesson.teacher, lesson.tokens.ids, lesson.tokens.mask, lesson.shelf(), both, micro_batch)
    total = len(lesson.blocks)
    for block in lesson.blocks:
        lesson.report(Progress("blocks", block.index, total, block.name))
        teacher = lesson.teacher.block(block.index)
        streams.teach(block.index, teacher)
        student = None
        if lesson.ranks(block):
            if not lesson.run.has_block(block.index):
                student = initial_student(lesson, block, teacher, streams)
                del teacher
                trim_memory()
                log = _taught(lesson, block, student, streams)
                lesson.save(block, student, log)
                del student
            student = lesson.finished(block)
        elif streams.parted:
            student = teacher
        streams.move_on(block.index, student)
        del student
        trim_memory()
    lesson.report(Progress("blocks", total, total))
    streams.remove()


def initial_student(lesson: Lesson, block: BlockSpec, teacher: nn.Module, streams: Streams) -> nn.Module:
    """Return a block's student before training."""
    ranks, init = lesson.ranks(block), lesson.job.recipe.init
    grams = collect_grams(teacher, ranks, streams.runs(block.index)) if init.needs_gram else {}
    generator = torch.Generator().manual_seed(lesson.seed(block))
    return compressed_copy(lesson.teacher.blocks[block.index], teacher, ranks, init, grams, generator)


def _taught(lesson: Lesson, block: BlockSpec, student: nn.Module, streams: Streams) -> DistillLog:
    config, rows = lesson.job.recipe.distill, lesson.rows
    data = streams.data(block.index, config.stream)
    lr, unit = config.peak_lr(lesson.job.plan.spec.hidden_size), data.unit(config.loss, rows.held_out)
    learner = Learner(student, config, lr, step_total(rows, config), unit)
    return distill_block(learner, block.name, data, rows, lesson.seed(block), lesson.report)


def teach_jointly(lesson: Lesson, snapshot_seconds: float = SNAPSHOT_SECONDS) -> None:
    """Let all blocks take a step on every batch, as published; note the state every `snapshot_seconds`."""
    trained = {block.index: block for block in lesson.blocks if lesson.ranks(block)}
    config, rows = lesson.job.recipe.distill, lesson.rows
    initial, units = _initial_students(lesson, trained)
    lr = config.peak_lr(lesson.job.plan.spec.hidden_size)

    def learner(index: int) -> Learner:
        return Learner(initial(index), config, lr, step_total(rows, config), units[index])

    streams = Streams.begun(
        lesson.teacher, lesson.tokens.ids, lesson.tokens.mask, lesson.shelf(), False, lesson.job.micro_batch
    )
    training = JointTraining(
        names={index: block.name for index, block in trained.items()},
        last=max(trained),
        teacher=_teacher_blocks(lesson),
        bench=Bench(learner, lesson.run.scratch, _resident(lesson, trained)),
        data=JointData(streams.calls, streams.teacher, lesson.tokens.mask, lesson.job.micro_batch),
        rows=rows,
        config=config,
        seed=lesson.job.recipe.seed,
        folder=lesson.run.joint,
        snapshot_seconds=snapshot_seconds,
    )
    for index, taught, log in training.run(lesson.report):
        lesson.save(trained[index], taught.student, log)
    streams.remove()


def _initial_students(
    lesson: Lesson, trained: Mapping[int, BlockSpec]
) -> tuple[Callable[[int], nn.Module], dict[int, float]]:
    """Compute every block's student before training; return what reads one back, and the units of the losses."""
    config, rows, units = lesson.job.recipe.distill, lesson.rows, dict[int, float]()
    streams = Streams.begun(
        lesson.teacher, lesson.tokens.ids, lesson.tokens.mask, lesson.shelf(), False, lesson.job.micro_batch
    )
    folder = lesson.run.scratch
    folder.mkdir(exist_ok=True)
    for block in lesson.blocks:
        lesson.report(Progress("blocks", block.index, len(lesson.blocks), block.name))
        teacher = lesson.teacher.block(block.index)
        streams.teach(block.index, teacher)
        if block.index in trained:
            student = initial_student(lesson, block, teacher, streams)
            save_tensors(folder / f"initial-{block.index:04}.safetensors", student.state_dict())
            units[block.index] = streams.data(block.index, "teacher").unit(config.loss, rows.held_out)
        streams.move_on(block.index, None)
    streams.remove()

    def initial(index: int) -> nn.Module:
        state = load_tensors(folder / f"initial-{index:04}.safetensors")
        template, ranks = lesson.teacher.blocks[index], lesson.ranks(trained[index])
        return restored_copy(template, ranks, state, lesson.teacher.device, torch.float32)

    return initial, units


def _teacher_blocks(lesson: Lesson) -> Callable[[int], nn.Module]:
    """Return what gives a teacher's block; the first ones, as many as a quarter of the free memory holds, are read once."""
    teacher, kept = lesson.teacher, dict[int, nn.Module]()
    largest = max(block.params for block in lesson.blocks) * teacher.dtype.itemsize
    room = free_memory(teacher.device) // 4 // largest

    def block(index: int) -> nn.Module:
        if index in kept:
            return kept[index]
        read = teacher.block(index)
        if index < room:
            kept[index] = read
        return read

    return block


def _resident(lesson: Lesson, trained: Mapping[int, BlockSpec]) -> int:
    """Return how many blocks under training fit into half of the free memory."""
    largest = max(block.params for block in trained.values())
    return free_memory(lesson.teacher.device) // 2 // (TRAINING_BYTES * largest)

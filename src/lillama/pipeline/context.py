"""The context of a run: a job, its calibration tokens, its run folder; what all stages of the work share."""

import gc
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn

from lillama.calibration.pack import CalibrationSet
from lillama.distill.log import DistillLog
from lillama.distill.split import Split
from lillama.lowrank.install import narrow
from lillama.lowrank.student import load_student
from lillama.model.spec import BlockSpec
from lillama.moments.gradients import GradientCache
from lillama.pipeline.job import Job
from lillama.pipeline.time_budget import Deadline
from lillama.ranks.spectra import Spectra
from lillama.ranks.widths import WidthCurve
from lillama.runs.run_dir import RunDir
from lillama.stream.activations import ActivationPlacement
from lillama.stream.batch import Batch, batch_of
from lillama.stream.model import StreamedModel
from lillama.system.progress import Progress, Report
from lillama.system.resources import trim_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunContext:
    """A job with its calibration tokens and its run folder.

    Attributes:
        job: what is to be done.
        tokens: that it is done with.
        run_dir: where results go.
        report: told about blocks and steps.
        gradients: gradients at the blocks' outputs, if the initialisation asks for them.
        deadline: when the command should end; None if it takes what it takes.
    """

    job: Job
    tokens: CalibrationSet
    run_dir: RunDir
    report: Report
    gradients: GradientCache | None = None
    deadline: Deadline | None = None

    @property
    def teacher(self) -> StreamedModel:
        """The original."""
        return self.job.teacher

    @property
    def blocks(self) -> tuple[BlockSpec, ...]:
        """All blocks up to the last one that is compressed; those above need not run."""
        spec = self.job.plan.spec
        last = max((block.index for block in spec if self.changes(block)), default=-1)
        return spec.blocks[: last + 1]

    @property
    def unfinished(self) -> tuple[BlockSpec, ...]:
        """The blocks that are to be compressed and are not yet."""
        return tuple(block for block in self.blocks if self.changes(block) and not self.run_dir.has_block(block.index))

    @property
    def rows(self) -> Split:
        """Training and held-out sequences."""
        return Split.of(len(self.batch), self.job.recipe.distill.held_out, self.job.recipe.seed)

    @cached_property
    def local_batch(self) -> Batch:
        """The sequences that initialisation and local distillation see."""
        rows = self._local_rows
        return self.batch if len(rows) == len(self.batch) else self.batch[rows]

    @cached_property
    def local_rows(self) -> Split:
        """Training and held-out sequences among those that initialisation and local distillation see."""
        return self.rows.within(self._local_rows)

    @property
    def _local_rows(self) -> Tensor:
        recipe, total = self.job.recipe, len(self.batch)
        seen = total if recipe.distill.tokens is None else recipe.distill.tokens // recipe.calibration.seq_len
        return self.rows.part(min(seen, total))

    @property
    def ample(self) -> bool:
        """Whether at least twice the memory that is needed is free; where it is not, memory is saved at the cost of time."""
        return self.job.memory.is_ample_for(self.job.needs.memory_bytes)

    def let_go(self) -> None:
        """Give freed memory back to the system, that of compiled blocks too, which are held in circles."""
        if self.job.machine.compile:
            gc.collect()
        trim_memory()

    def compiled(self, batch_size: int, stage: str, ample: bool = True) -> int:
        """Return the sequences of the micro-batches for which the steps of a stage are compiled; 0 for none.

        Compiled steps round differently: what memory allowed at first is noted, and a resumed run follows it.
        """
        if not self.job.machine.compile or not self.run_dir.decision(f"{stage} compiled", ample):
            return 0
        return min(batch_size, self.job.micro_batch)

    def ranks(self, block: BlockSpec) -> dict[str, int]:
        """Return name within the block -> rank."""
        return self.job.plan.ranks_within(block)

    def widths(self, block: BlockSpec) -> dict[str, int]:
        """Return name within the block of the last linear of a narrower FFN -> neurons that it keeps."""
        return self.job.plan.widths_within(block)

    @cached_property
    def width_curves(self) -> Mapping[str, WidthCurve]:
        """Name of an FFN's last linear -> in which order its neurons are left out."""
        return Spectra.load(self.run_dir.spectra).widths if self.job.plan.widths else {}

    def changes(self, block: BlockSpec) -> bool:
        """Return whether anything of a block is compressed."""
        return self.job.plan.changes(block)

    def template(self, block: BlockSpec) -> nn.Module:
        """Return a block without weights, in the shapes that its student has before linears are factorised."""
        template = self.teacher.template(block.index)
        narrow(template, self.job.plan.shapes_within(block))
        return template

    def seed(self, block: BlockSpec) -> int:
        """Return the seed of a block's random choices."""
        return self.job.recipe.seed * 10_007 + block.index

    @cached_property
    def batch(self) -> Batch:
        """What the model is run on."""
        return batch_of(self.teacher.kind, self.tokens.ids, self.tokens.mask, self.tokens.inputs)

    def current(self, index: int) -> nn.Module:
        """Return a block of the compressed model as it is by now."""
        block = self.job.plan.spec.blocks[index]
        return self.finished(block) if self.changes(block) else self.teacher.block(index)

    def save(self, block: BlockSpec, student: nn.Module, log: DistillLog) -> None:
        """Write a finished student, its parameters in fp32."""
        if not log.improved and log.steps:
            logger.info("%s: training did not improve on the initialisation, which is kept", block.name)
        if log.grown:
            name, ratio = max(log.grown.items(), key=lambda item: item[1])
            logger.warning(
                "%s: training made the largest singular value of %s %.1f times as large; such factors may do harm on other "
                "text: lower distill.lr, or set distill.norm",
                block.name,
                name,
                ratio,
            )
        made_from = {"calibration": self.tokens.seal, "ranks": self.ranks(block), "widths": self.widths(block)}
        self.run_dir.save_block(block.index, student.state_dict(), log, made_from)
        moved = f"{log.block}: held-out loss {log.initial:.5f} -> {log.final:.5f}"
        self.report(Progress("taught", block.index + 1, len(self.blocks), moved))

    def finished(self, block: BlockSpec) -> nn.Module:
        """Return a finished student as it was written, to compute with."""
        template, state = self.template(block), self.run_dir.load_block(block.index)
        return load_student(template, self.ranks(block), state, self.teacher.device, self.teacher.dtype)

    def last_state(self, block: BlockSpec) -> dict[str, Tensor]:
        """Return the weights of a finished student, those after recovery where it made them better."""
        recovered = self.run_dir.load_recovered(block.index)
        return self.run_dir.load_block(block.index) if recovered is None else recovered

    def drop_gradients(self) -> "RunContext":
        """Return the context once every block has its initial factors, without the gradients that they needed."""
        if self.gradients is not None:
            self.gradients.remove()
        return replace(self, gradients=None)

    def placement(self) -> ActivationPlacement:
        """Return where activations go."""
        return ActivationPlacement.on(
            self.teacher.device, self.run_dir.scratch, self.job.machine.activation_memory, self.job.memory
        )

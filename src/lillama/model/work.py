"""What is to be done to a model, in numbers; what a stage of it costs. Each stage tells its cost beside its code."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from lillama.model.spec import BlockSpec, LinearSpec, ModelSpec


@dataclass(frozen=True)
class StageCost:
    """What a stage of the work needs.

    Attributes:
        memory: bytes on the device.
        activations: bytes of activations between blocks, in memory or on disk.
        flops: floating-point operations.
        disk: bytes of snapshots, while the stage goes on.
    """

    memory: int
    activations: int
    flops: float
    disk: int = 0


@dataclass(frozen=True)
class BlockWork:
    """A block, and its student.

    Attributes:
        spec: the block.
        ranks: name of each linear in the model -> rank, or None where it stays dense.
        shapes: name of a linear -> rows and columns that it becomes, in a narrower FFN.
    """

    spec: BlockSpec
    ranks: Mapping[str, int | None]
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])

    @property
    def changed(self) -> bool:
        """Whether anything of the block is compressed."""
        return any(self.ranks[linear.name] is not None or linear.name in self.shapes for linear in self.spec.linears)

    @cached_property
    def kept_params(self) -> int:
        """Parameters of the student, or of the block itself where it stays dense."""
        return self.spec.params - sum(map(self._removed, self.spec.linears))

    @cached_property
    def active_params(self) -> float:
        """Those of the kept parameters that a token meets."""
        spec = self.spec
        return spec.active_params - sum(x.share * self._removed(x) for x in spec.linears)

    def _removed(self, linear: LinearSpec) -> int:
        if linear.name in self.shapes:
            return linear.params - math.prod(self.shapes[linear.name])
        return linear.params - linear.params_at(self.ranks[linear.name])


@dataclass(frozen=True)
class Work:
    """What is to be done, and how much of everything there is.

    Attributes:
        spec: the original.
        ranks: name of each linear -> rank, or None where it stays dense.
        shapes: name of a linear -> rows and columns that it becomes, in a narrower FFN.
        tokens: of calibration that initialisation and distillation see.
        recovered: of calibration in all, which recovery sees.
        held_out: those of them that nothing is trained on.
        seq_len: tokens of a sequence.
        itemsize: bytes of a weight or activation in memory.
        micro_batch: sequences that are computed at once.
        gradients: whether gradients at the linears' outputs are measured.
        moments_kept: whether moments stay in memory from when the spectra are measured; else they are computed again.
        narrows: whether the widths of FFNs are measured beside the spectra.
        mixes: whether what linears lose by few bits is measured in the place of the spectra.
        rounded: linears that are rounded with feedback.
    """

    spec: ModelSpec
    ranks: Mapping[str, int | None]
    shapes: Mapping[str, tuple[int, int]]
    tokens: int
    recovered: int
    held_out: int
    seq_len: int
    itemsize: int
    micro_batch: int
    gradients: bool
    moments_kept: bool
    narrows: bool = False
    mixes: bool = False
    rounded: frozenset[str] = frozenset()

    @cached_property
    def blocks(self) -> tuple[BlockWork, ...]:
        """All blocks, from input to output."""
        return tuple(BlockWork(block, self.ranks, self.shapes) for block in self.spec)

    @cached_property
    def trained(self) -> tuple[BlockWork, ...]:
        """The blocks of which anything is compressed."""
        return tuple(block for block in self.blocks if block.changed)

    @property
    def active_params(self) -> float:
        """Parameters of all blocks of the original that a token meets."""
        return sum(block.active_params for block in self.spec)

    @property
    def head_params(self) -> int:
        """Parameters of the head, taken as all that lies outside the blocks: exact where it shares the embeddings."""
        return self.spec.params - self.spec.block_params

    def activation_bytes(self, tokens: int) -> int:
        """Return the bytes of some tokens' activations between two blocks."""
        return tokens * self.spec.hidden_size * self.itemsize

    def graph_bytes(self, block: BlockWork) -> int:
        """Return the bytes of what a block's linears take and give for a micro-batch, and of the gradients at it."""
        linears = block.spec.linears
        numbers = sum(x.share * (x.in_features + 2 * x.out_features + (self.ranks[x.name] or 0)) for x in linears)
        return round(self.micro_batch * self.seq_len * numbers) * self.itemsize

"""What a compression will need: memory, disk and time, from shapes alone."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from lillama.lowrank.gram import TILE, WIDEST, held
from lillama.model.spec import BlockSpec, LinearSpec
from lillama.moments.gradients import PROBED_TOKENS
from lillama.ranks.adaptive import Adaptive
from lillama.ranks.plan import RankPlan
from lillama.recipes.recipe import Recipe
from lillama.system.memory import LOGIT_BYTES_IN_TRAINING, MemoryBudget

TRIAL_SIZE, TRIAL_SECONDS = 1024, 0.2
EFFICIENCY = 0.6  # of the measured matmul rate that a training step is assumed to reach
FINISHED_BYTES = 4  # a parameter in the file of a finished block
# A parameter in the files of a schedule over all blocks: two snapshots of 12 or 16 bytes while one replaces the other, and
# what finds no room in memory: initial state (joint), or state under training and best state (recovery).
JOINT_BYTES, TAIL_BYTES = 36, 48
BLOCK_BYTES = 32  # a parameter of the block that is taught in a sequential schedule, in two snapshots
MASTER_BYTES = 20  # a parameter under training in fp32: itself, gradient, two moments, best state
DECOMPOSED = 4  # fp64 matrices of a linear's smaller side: one to decompose, its eigenvectors, working space for two
LOGITS = 5  # (tokens x vocabulary) matrices in memory together
NO_MEMORY = MemoryBudget(0, 0)


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


@dataclass(frozen=True)
class _Stage:
    """What a stage of the work needs: bytes on the device, bytes of activations between blocks, operations."""

    memory: int
    activations: int
    flops: float


@dataclass(frozen=True)
class _Work:
    """What is to be done, and how much of everything there is."""

    plan: RankPlan
    recipe: Recipe
    itemsize: int
    micro_batch: int
    open_ranks: bool
    memory: MemoryBudget

    @cached_property
    def trained(self) -> list[BlockSpec]:
        return [block for block in self.plan.spec if self.plan.within(block)]

    @cached_property
    def kept(self) -> dict[int, int]:
        """Block index -> parameters of the student, or of the block itself where it stays dense."""
        return {
            block.index: block.params
            - sum(linear.params - linear.params_at(self.plan[linear.name]) for linear in block.linears)
            for block in self.plan.spec
        }

    @cached_property
    def active(self) -> dict[int, float]:
        """Block index -> those of the parameters in `kept` that a token meets."""
        return {
            block.index: block.active_params
            - sum(linear.share * (linear.params - linear.params_at(self.plan[linear.name])) for linear in block.linears)
            for block in self.plan.spec
        }

    @property
    def all(self) -> float:
        """Parameters of all blocks that a token meets."""
        return sum(block.active_params for block in self.plan.spec)

    @property
    def head(self) -> int:
        """Parameters of the head, taken as all that lies outside the blocks: exact where it shares the embeddings."""
        return self.plan.spec.params - self.plan.spec.block_params

    @property
    def tokens(self) -> int:
        return self.recipe.calibration.tokens

    @property
    def held_out(self) -> int:
        return round(self.recipe.distill.held_out * self.tokens)

    @property
    def gradients(self) -> bool:
        """Whether gradients are measured."""
        return self.open_ranks or self.recipe.init.needs_gradient

    @property
    def probed(self) -> int:
        """Tokens on which gradients are measured."""
        return min(self.tokens, PROBED_TOKENS) if self.gradients else 0

    @cached_property
    def moments_again(self) -> bool:
        """Whether the moments are computed each time that they are asked for, or kept from when the spectra were."""
        return not (self.open_ranks and moments_fit(self.plan.spec, self.memory.moments))

    def stored(self, tokens: int) -> int:
        """Return the bytes of activations of some tokens."""
        return tokens * self.plan.spec.hidden_size * self.itemsize

    def head_memory(self) -> int:
        """Return the bytes of the head and its logits."""
        logits = 4 * self.recipe.calibration.seq_len * (self.head // self.plan.spec.hidden_size)
        return self.head * self.itemsize + LOGITS * min(LOGIT_BYTES_IN_TRAINING, logits)


def estimate(
    plan: RankPlan,
    recipe: Recipe,
    itemsize: int,
    micro_batch: int,
    rate: float | None = None,
    *,
    open_ranks: bool = True,
    memory: MemoryBudget = NO_MEMORY,
) -> Estimate:
    """Estimate what a compression by this plan will need.

    Args:
        plan: ranks of the model's linears; of about the final size where they are still open.
        recipe: what is computed.
        itemsize: bytes of a weight or activation in memory.
        micro_batch: sequences that are computed at once.
        rate: floating-point operations a second, from `matmul_rate`.
        open_ranks: whether a recipe that takes ranks from the weights may do so; false where a file gives them.
        memory: that there is; moments that find no room in it are computed again.
    """
    work = _Work(plan, recipe, itemsize, micro_batch, open_ranks and recipe.ranks.needs_spectra, memory)
    stages = [_teaching(work)] if work.trained else []
    if work.trained and work.gradients:
        stages.append(_gradients(work))
    if work.trained and isinstance(recipe.ranks, Adaptive) and work.open_ranks:
        stages.append(_comparison(work, 1 + len(recipe.ranks.mix)))
    if work.trained and recipe.recover.epochs:
        stages.append(_recovery(work))
    flops = round(sum(stage.flops for stage in stages))
    kept = [work.kept[block.index] for block in work.trained]
    snapshots = JOINT_BYTES * sum(kept) if recipe.distill.schedule == "joint" else BLOCK_BYTES * max(kept, default=0)
    snapshots = max(snapshots, TAIL_BYTES * sum(kept) if recipe.recover.epochs else 0)
    return Estimate(
        memory_bytes=max((stage.memory for stage in stages), default=0),
        activation_bytes=max((stage.activations for stage in stages), default=0),
        disk_bytes=plan.kept_bytes + FINISHED_BYTES * sum(kept) + snapshots,
        flops=flops,
        seconds=None if rate is None else flops / (EFFICIENCY * rate),
    )


def moments_fit(blocks: Iterable[BlockSpec], room: int) -> bool:
    """Tell whether the moments at all linears fit in so many bytes."""
    linears = (linear for block in blocks for linear in block.linears)
    return sum(8 * (held(linear.in_features) + _at_outputs(linear)) for linear in linears) <= room


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure floating-point operations a second of square matrix products, for about 0.2 s."""
    a = torch.randn(TRIAL_SIZE, TRIAL_SIZE, device=device).to(dtype)
    (a @ a).sum().item()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < TRIAL_SECONDS:
        (a @ a).sum().item()
        count += 1
    return 2 * TRIAL_SIZE**3 * count / (time.perf_counter() - start)


def _teaching(work: _Work) -> _Stage:
    """Return what distillation needs, block by block or in all blocks, and the blocks' initialisation."""
    spec, tokens, config, active = work.plan.spec, work.tokens, work.recipe.distill, work.active
    joint = config.schedule == "joint"
    own_stream = not joint and config.stream != "teacher"
    run = spec.blocks[: work.trained[-1].index + 1]  # those above need not run
    memory = [_memory(block, work) for block in work.trained]
    fed = 2 if config.stream == "both" else 1
    forward = sum(2 * block.active_params + own_stream * 2 * active[block.index] for block in run)
    adapted = sum(2 * block.active_params for block in work.trained) if config.adaptive else 0
    ahead = max(block.params for block in spec) if config.look_ahead else 0
    further = (
        4 * max(block.active_params for block in spec) if config.look_ahead else 0
    )  # forth and back, without its weights
    training = sum((3 * 2 * active[block.index] + further) * fed * config.epochs for block in work.trained)
    stores = (3 if own_stream else 2) + bool(config.look_ahead) + bool(config.adaptive)
    parts = max(len(_children(block)) for block in work.trained) if config.sub_blocks else 0
    probed = len(spec.blocks) * work.probed if work.recipe.init.needs_gradient else 0
    return _Stage(
        memory=(sum(memory) if joint else max(memory)) + ahead * work.itemsize,
        activations=work.stored((stores + parts) * tokens + probed),
        flops=tokens * (forward + adapted + training) + sum(_initial_flops(block, work) for block in work.trained),
    )


def _gradients(work: _Work) -> _Stage:
    """Return what one pass forth and one back through the original needs, and the spectra on the way where ranks are open."""
    spec, flops = work.plan.spec, 6 * work.all + 4 * work.head  # forth, and forth again on the way back
    if work.open_ranks:
        flops += sum(_moment_flops(block) for block in spec)
    spectra = sum(map(_factor_flops, spec.linears)) if work.open_ranks else 0
    return _Stage(
        memory=max(max(_memory(block, work) for block in work.trained), work.head_memory()),
        activations=work.stored((len(spec.blocks) + 2) * work.probed),
        flops=work.probed * flops + spectra,
    )


def _comparison(work: _Work, plans: int) -> _Stage:
    """Return what it takes to run the original and the initial students by so many plans over the held-out tokens."""
    spec, streams = work.plan.spec, work.all + plans * sum(work.active.values())
    probed = 2 * work.all
    if work.moments_again:
        probed += sum(4 * block.active_params + _moment_flops(block) for block in work.trained)
    return _Stage(
        memory=max(max(_memory(block, work) for block in work.trained), work.head_memory()),
        activations=work.stored((len(spec.blocks) + 1) * work.probed + (1 + plans) * work.held_out),
        flops=work.held_out * (2 * streams + (1 + plans) * 4 * work.head)
        + work.probed * probed
        + sum(_factor_flops(linear) for block in work.trained for linear in block.linears),
    )


def _recovery(work: _Work) -> _Stage:
    """Return what recovery needs where graphs find no room, so that every block runs again on the way back."""
    spec, config, seq_len = work.plan.spec, work.recipe.recover, work.recipe.calibration.seq_len
    chain, trained = spec.blocks[work.trained[0].index :], {block.index for block in work.trained}
    forward = sum(2 * work.active[block.index] for block in chain)
    back = sum((4 if block.index in trained else 2) * work.active[block.index] for block in chain)
    learnt = config.epochs * (work.tokens - work.held_out) * (2 * forward + back + 6 * work.head)
    checked = (config.checks + 1) * work.held_out * (forward + 4 * work.head)
    return _Stage(
        memory=max(_memory(block, work) for block in work.trained) + work.head_memory(),
        activations=work.stored(2 * work.tokens + len(chain) * config.batch_size * seq_len),
        flops=work.tokens * 2 * work.all + learnt + checked,
    )


def _memory(block: BlockSpec, work: _Work) -> int:
    """Return the bytes that measuring and initialising a block take, or its training, whichever is more."""
    grams = sum(held(width) for width, _ in _gram_widths(block))
    gradients = sum(map(_at_outputs, block.linears)) if work.gradients else 0
    decomposed = DECOMPOSED * max(min(linear.in_features, linear.out_features) for linear in block.linears) ** 2
    numbers = sum(x.share * (x.in_features + 2 * x.out_features + (work.plan[x.name] or 0)) for x in block.linears)
    activations = round(work.micro_batch * work.recipe.calibration.seq_len * numbers) * work.itemsize
    measured = block.params * work.itemsize + 8 * (grams + gradients + decomposed)
    return max(measured, work.kept[block.index] * MASTER_BYTES) + activations


def _initial_flops(block: BlockSpec, work: _Work) -> float:
    """Return the operations of a block's initialisation; its inputs come with the teacher's own forward pass."""
    init = work.recipe.init
    flops: float = sum(map(_factor_flops, block.linears))
    if init.needs_gram:
        flops += work.tokens * _grams_flops(_gram_widths(block))
    if init.needs_gradient and work.moments_again:
        flops += work.probed * (4 * block.active_params + _moment_flops(block))
    return flops


def _at_outputs(linear: LinearSpec) -> int:
    """Return the numbers in the Gram of the gradients at a linear's outputs."""
    return held(linear.out_features, WIDEST)


def _moment_flops(block: BlockSpec) -> float:
    """Return the operations a token costs in the Grams at both sides of all linears of a block."""
    wide = ((linear.out_features, linear.share) for linear in block.linears if linear.out_features <= WIDEST)
    return _grams_flops([*_gram_widths(block), *wide])


def _grams_flops(widths: Iterable[tuple[int, float]]) -> float:
    """Return the operations a token costs in Grams of widths that a share of the tokens comes to; see `Gram.add`."""
    return sum(share * width * (width + min(TILE, width)) for width, share in widths)  # tiles on and above the diagonal


def _factor_flops(linear: LinearSpec) -> int:
    """Return about how many fp32 operations take as long as the fp64 decompositions and products of a linear."""
    least, most = sorted((linear.in_features, linear.out_features))
    return least**2 * (44 * least + 8 * most)


def _gram_widths(block: BlockSpec) -> list[tuple[int, float]]:
    """Return the width of each Gram, and the share of the tokens that comes to it.

    Linears of one module that are equally wide are taken to share their inputs.
    """
    found = {(x.name.rpartition(".")[0], x.in_features): (x.in_features, x.share) for x in block.linears}
    return list(found.values())


def _children(block: BlockSpec) -> set[str]:
    """Return the children of a block that hold linears."""
    return {linear.name.removeprefix(f"{block.name}.").partition(".")[0] for linear in block.linears}

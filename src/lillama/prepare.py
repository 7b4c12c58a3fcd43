"""Everything that is checked and decided before work begins: a compression as a value."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lillama.calibration.gather import load_tokenizer
from lillama.calibration.sources import fingerprint
from lillama.errors import RecipeError, ResourceError
from lillama.estimate import Estimate, estimate, matmul_rate
from lillama.files import digest
from lillama.model.describe import describe, describe_model, refuse_quantized
from lillama.model.source import load_config, locate
from lillama.ranks.plan import RankPlan
from lillama.recipe import Recipe, chosen
from lillama.resources import free_disk, free_memory, pick_device
from lillama.stream.streamed import StreamedModel, open_streamed

CPU_TOKENS, ACCELERATOR_TOKENS = 4096, 16384  # computed at once, if the user does not say


@dataclass(frozen=True)
class Machine:
    """How a compression is computed; nothing of it changes what is computed beyond rounding.

    Attributes:
        device: that computes; None takes an accelerator if there is one.
        micro_batch: sequences that are computed at once; None takes as many as hold 4096 tokens, 16384 on accelerators.
        activation_memory: bytes of activations between blocks that may lie in memory, more goes to disk; None takes a
            quarter of what is free.
        shard_bytes: largest size of a weight file of the result.
    """

    device: str | None = None
    micro_batch: int | None = None
    activation_memory: int | None = None
    shard_bytes: int = 5_000_000_000

    def rows(self, seq_len: int, device: torch.device) -> int:
        """Return the sequences that are computed at once."""
        tokens = CPU_TOKENS if device.type == "cpu" else ACCELERATOR_TOKENS
        return self.micro_batch or max(1, tokens // seq_len)


@dataclass(frozen=True)
class Planned:
    """A rank plan and what it takes to carry it out.

    Attributes:
        plan: rank of each linear.
        recipe: that it was made by.
        estimate: memory, disk and time.
    """

    plan: RankPlan
    recipe: Recipe
    estimate: Estimate

    def as_json(self) -> dict[str, Any]:
        """Return the value that `lillama plan --json` prints; `version` counts its breaking changes."""
        spec = self.plan.spec
        return {
            "version": 1,
            "architecture": spec.architecture,
            "recipe": self.recipe.hash,
            "keep": self.plan.keep,
            "params": {"dense": spec.params, "kept": self.plan.kept_params},
            "bytes": {"dense": spec.params * spec.bytes_per_param, "kept": self.plan.kept_bytes},
            "linears": [
                {"name": linear.name, "out": linear.out_features, "in": linear.in_features, "rank": rank}
                for linear, rank in self.plan
            ],
            "estimate": asdict(self.estimate),
        }


def plan(
    model: str | Path,
    *,
    keep: float | None = None,
    recipe: str | Path | Recipe = "default",
    calibration: Sequence[str] | None = None,
    tokens: int | None = None,
    seq_len: int | None = None,
    scope: str | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    seed: int | None = None,
    rank_plan: str | Path | None = None,
    machine: Machine | None = None,
) -> Planned:
    """Decide the rank of every linear from the model's configuration alone; no weight is read.

    Args:
        model: local folder or hub id.
        keep: share of the parameters that remains; by default the recipe's.
        recipe: name, YAML file, or `Recipe`.
        calibration: paths or dataset ids; `["self"]` lets the model write the text. It only matters for the estimate.
        tokens: of calibration.
        seq_len: tokens of a sequence.
        scope: what `keep` is a share of: `model` or `blocks`.
        targets: globs of the linears to factorise.
        ignore: globs of linears to leave dense.
        seed: of every random choice.
        rank_plan: file of a plan to use instead of a new one.
        machine: how it would be computed.

    Raises:
        LillamaError: the model, the recipe or the size cannot be used.

    Examples:
        >>> planned = plan("demo/model", keep=0.6)
        >>> planned.plan.keep <= 0.6, planned.plan["model.layers.0.mlp.up_proj"]
        (True, 80)
    """
    wanted = chosen(recipe, keep=_keep(keep, rank_plan), scope=scope, targets=targets, ignore=ignore,
                    calibration=calibration, tokens=tokens, seq_len=seq_len, seed=seed)  # fmt: skip
    config = load_config(locate(model, weights=False))
    spec = describe(config, wanted.targets, wanted.ignore)
    ranks = RankPlan.load(Path(rank_plan), spec) if rank_plan else wanted.ranks(spec, wanted.keep, wanted.scope)
    device = pick_device((machine or Machine()).device)
    dtype = torch.float32 if device.type == "cpu" else config.dtype or torch.float32
    rows = (machine or Machine()).rows(wanted.calibration.seq_len, device)
    return Planned(ranks, wanted, estimate(ranks, wanted, dtype.itemsize, rows, matmul_rate(device, dtype)))


@dataclass(frozen=True)
class Job:
    """A compression that is ready to begin.

    Attributes:
        model: as the user named it.
        recipe: what is computed.
        teacher: the original.
        tokenizer: the original's.
        plan: rank of each linear.
        machine: how it is computed.
        needs: memory, disk and time.
    """

    model: str
    recipe: Recipe
    teacher: StreamedModel
    tokenizer: PreTrainedTokenizerBase
    plan: RankPlan
    machine: Machine
    needs: Estimate

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.teacher.device

    @property
    def micro_batch(self) -> int:
        """Sequences that are computed at once."""
        return self.machine.rows(self.recipe.calibration.seq_len, self.device)

    def identity(self) -> dict[str, Any]:
        """Return what makes this run this run: recipe, ranks, model, data; equal identities give equal results."""
        return {
            "recipe": self.recipe.as_dict(),
            "plan": digest(dict(self.plan.ranks)),
            "model": self.teacher.reader.fingerprint(),
            "data": {source.path: fingerprint(source) for source in self.recipe.calibration.sources},
        }


def prepared(model: str | Path, recipe: Recipe, rank_plan: str | Path | None, machine: Machine) -> Job:
    """Check model, recipe and machine, and decide the ranks; nothing is written.

    All weights are read once, tensor by tensor, so that a damaged file is found now and not hours later.

    Raises:
        LillamaError: something cannot be used; the text says what and how to mend it.
    """
    device = pick_device(machine.device)
    folder = locate(model)
    refuse_quantized(load_config(folder))
    teacher = open_streamed(folder, device)
    spec = describe_model(teacher.skeleton, recipe.targets, recipe.ignore)
    ranks = RankPlan.load(Path(rank_plan), spec) if rank_plan else recipe.ranks(spec, recipe.keep, recipe.scope)
    for name in teacher.names.values():
        teacher.reader.read(name)
    tokenizer = load_tokenizer(folder)
    rows = machine.rows(recipe.calibration.seq_len, device)
    needs = estimate(ranks, recipe, teacher.dtype.itemsize, rows)
    return Job(str(model), recipe, teacher, tokenizer, ranks, machine, needs)


def checked_room(job: Job, folder: Path, present: int) -> None:
    """Refuse a compression that the machine has no room for.

    Args:
        job: to be done.
        folder: where result and run folder will lie.
        present: bytes that an earlier, unfinished run has written already.

    Raises:
        ResourceError: disk or memory does not suffice.
    """
    disk = job.needs.disk_bytes - present
    if disk > free_disk(folder):
        raise ResourceError(
            f"{folder}: {disk / 1e9:.2f} GB of disk are needed for result and run folder, {free_disk(folder) / 1e9:.2f} "
            "GB are free; free some, or put OUT or the run folder (--run) on another disk"
        )
    memory = job.needs.memory_bytes
    if job.recipe.distill.schedule == "sequential" and memory > free_memory(job.device):
        raise ResourceError(
            f"about {memory / 1e9:.2f} GB of memory are needed on {job.device}, {free_memory(job.device) / 1e9:.2f} GB are "
            "free; lower --micro-batch or --seq-len, or choose another --device"
        )


def _keep(keep: float | None, rank_plan: str | Path | None) -> float | None:
    if keep is not None and rank_plan is not None:
        raise RecipeError("give keep or a rank plan, not both; the plan decides the size")
    return keep

"""Zero-Sum-SVD-like: ranks by predicted changes of the loss that cancel out (arXiv 2602.02848), as a row to compare with.

Written anew from the paper's formulas as its authors' code has them (github.com/mint-vu/Zero-Sum-SVD). With the whitened
weight `A = W S`, `S S^T` the second moments of the inputs, `A = U diag(s) V^T`, and `G` the gradient of the mean loss at `W`,
leaving out component i changes the loss to first order by

    d_i = -s_i u_i^T G S^-T v_i = -u_i^T G W^T u_i

Every weight loses its components from the smallest singular value on. Which weight is next: of those whose change has the
sign that brings the sum of all changes so far back to 0, the one whose change is smallest. A weight whose rank ends above
its break-even rank stays dense. That is the plan; lillama's whitened initialisation cuts to the same components.

For all models but one the authors correct between rounds: cut as planned, add to each cut weight `W_k` the projection
`<g, D> / <g, g> g` of what was cut, `D = W - W_k`, onto the gradient `g` of the loss on one sample; then plan and cut anew.
"""

import heapq
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

import lillama
from baselines.whole import Ids, Weights, gradients, input_grams, load_whole, put_weights, save_whole
from lillama.errors import BudgetError
from lillama.lowrank.eigen import eigh
from lillama.lowrank.gram import Gram
from lillama.model.describe import describe
from lillama.model.source import load_config
from lillama.model.spec import LinearSpec, ModelSpec
from lillama.ranks.plan import PLAIN, RankPlan, budget
from lillama.recipes.options import Machine, OverridesDict
from lillama.recipes.recipe import Recipe

STAGES = 6  # of planning and cutting, with a correction between each two
SCORED_TOKENS, CORRECTED_TOKENS = 2048, 1024  # that gradients are taken of: one sample of the authors'
FLOOR, FLOORED = 0.3, 0.4  # of its break-even rank each weight keeps that share where so little of the blocks remains
DAMPING = 1e-6  # of second moments, as a share of their mean eigenvalue: that of lillama's whitened initialisation


@dataclass(frozen=True)
class Components:
    """A weight as a sum of whitened singular components, the largest singular value first.

    Attributes:
        left: the left singular vectors.
        changes: of the loss, in nats a token, if a component is left out; to first order.
    """

    left: Float[Tensor, "out least"]
    changes: Float[Tensor, " least"]

    @classmethod
    def of(cls, weight: Float[Tensor, "out in"], inputs: Gram, gradient: Float[Tensor, "out in"]) -> "Components":
        """Decompose a weight; of a tall one only a matrix of its inputs' size is decomposed."""
        w, gradient = weight.double(), gradient.double()
        basis, core = torch.linalg.qr(w) if len(w) > w.shape[1] else (None, w)
        left = eigh((inputs.product(core) + DAMPING * inputs.mean_eigenvalue * core) @ core.T)[1].flip(-1)
        left = left if basis is None else basis @ left
        return cls(left.float(), -((gradient.T @ left) * (w.T @ left)).sum(dim=0))

    def cut(self, weight: Float[Tensor, "out in"], rank: int) -> Float[Tensor, "out in"]:
        """Return the weight without the components behind the `rank`-th."""
        left = self.left[:, :rank]
        return left @ (left.T @ weight)


def compress(
    model_folder: Path,
    calibration_ids: Ids,
    keep_of_block_parameters: float,
    out_folder: Path,
    *,
    stages: int = STAGES,
    recipe: str | Path | Recipe = "baselines/svd-llm",
    device: str | None = None,
    **options: Unpack[OverridesDict],
) -> lillama.Result:
    """Make a model smaller by a zero-sum plan, and for more than one stage from corrected weights.

    Args:
        model_folder: of the original.
        calibration_ids: token ids, sequences x length.
        keep_of_block_parameters: share of the blocks' numbers that remains.
        out_folder: folder to make.
        stages: of planning and cutting; 1 makes no correction.
        recipe: of the last cut.
        device: that computes; by default an accelerator if there is one.
        **options: of `lillama.compress`, among them the calibration text that the ids are of.
    """
    with tempfile.TemporaryDirectory() as scratch:
        corrected, file = Path(scratch) / "corrected", Path(scratch) / "plan.json"
        seed = options.get("seed") or 0
        prepare(
            model_folder, calibration_ids, keep_of_block_parameters, corrected, stages=stages, seed=seed, device=device
        ).save(file)
        machine, run = Machine(device=device), Path(scratch) / "run"
        return lillama.compress(
            corrected, out_folder, rank_plan=file, recipe=recipe, machine=machine, run=run, **options
        )


def prepare(
    model_folder: Path,
    calibration_ids: Ids,
    keep_of_block_parameters: float,
    corrected_folder: Path,
    *,
    stages: int = STAGES,
    seed: int = 0,
    device: str | None = None,
) -> RankPlan:
    """Plan ranks, and write the dense model that is to be cut by the plan: for one stage the original.

    Args:
        model_folder: of the original.
        calibration_ids: token ids, sequences x length.
        keep_of_block_parameters: share of the blocks' numbers that remains.
        corrected_folder: folder to make.
        stages: of planning and cutting.
        seed: of the samples that corrections look at.
        device: that computes; by default an accelerator if there is one.

    Raises:
        BudgetError: so little cannot be kept.
    """
    spec, model = describe(load_config(model_folder)), load_whole(model_folder, device)
    names = [linear.name for linear in spec.linears]
    dense = {name: model.get_parameter(f"{name}.weight").detach().clone() for name in names}
    generator = torch.Generator().manual_seed(seed)
    plan, cut = cut_by_plan(model, calibration_ids, spec, keep_of_block_parameters)
    for _ in range(stages - 1):
        put_weights(model, dense | cut)  # what stays dense is the original's
        order = torch.randperm(len(calibration_ids), generator=generator)
        slopes = gradients(model, sample(calibration_ids[order], CORRECTED_TOKENS), cut)
        put_weights(model, {name: correct(weight, dense[name], slopes[name]) for name, weight in cut.items()})
        plan, cut = cut_by_plan(model, calibration_ids, spec, keep_of_block_parameters)
    put_weights(model, {name: dense[name] for name in names if name not in cut})
    save_whole(model, model_folder, corrected_folder, spec.dtype, {})
    return plan


def cut_by_plan(model: PreTrainedModel, ids: Ids, spec: ModelSpec, keep: float) -> tuple[RankPlan, Weights]:
    """Return the zero-sum plan of a model as it is, and the weights that it cuts, as they are then."""
    names = [linear.name for linear in spec.linears]
    weights = {name: model.get_parameter(f"{name}.weight").detach() for name in names}
    slopes, grams = gradients(model, sample(ids, SCORED_TOKENS), names), input_grams(model, ids, names)
    found = {name: Components.of(weights[name], grams[name], slopes[name]) for name in names}
    plan = plan_ranks(spec, {name: own.changes.tolist() for name, own in found.items()}, keep)
    return plan, {name: found[name].cut(weights[name], rank) for name, rank in plan.factorised.items()}


def sample(ids: Ids, tokens: int) -> Ids:
    """Return the first sequences that hold so many tokens, and at least one."""
    return ids[: max(1, math.ceil(tokens / ids.shape[1]))]


def correct(
    cut: Float[Tensor, "out in"], dense: Float[Tensor, "out in"], slope: Float[Tensor, "out in"]
) -> Float[Tensor, "out in"]:
    """Return a cut weight with what the gradient's direction holds of the difference to the dense one."""
    length = slope.square().sum()
    return cut + ((slope * (dense - cut)).sum() / length if length > 0 else 0.0) * slope


def plan_ranks(spec: ModelSpec, changes: Mapping[str, Sequence[float]], keep: float) -> RankPlan:
    """Return the zero-sum plan that keeps at most `keep` of the blocks' numbers.

    Args:
        spec: of the model.
        changes: name of a linear -> the change of the loss by each of its components, the largest singular value first.
        keep: share of the blocks' numbers that remains.

    Raises:
        BudgetError: so little cannot be kept.
    """
    ranks = {linear.name: min(linear.out_features, linear.in_features) for linear in spec.linears}
    linears, floors = {linear.name: linear for linear in spec.linears}, _floors(spec, keep)
    excess, balance = spec.params - budget(spec, keep, "blocks"), 0.0
    waiting: dict[bool, list[tuple[float, int, str]]] = {True: [], False: []}  # whether leaving it out raises the loss
    turn = 0

    def offer(name: str) -> None:
        nonlocal turn
        if ranks[name] > floors[name]:
            change, turn = changes[name][ranks[name] - 1], turn + 1
            heapq.heappush(waiting[change >= 0], (abs(change), turn, name))

    for name in ranks:
        offer(name)
    while excess > 0:
        heap = waiting[balance <= 0] or waiting[balance > 0]
        if not heap:
            raise BudgetError(
                f"keep {keep} of the blocks cannot be reached: {excess:,} numbers remain too many; keep more"
            )
        name = heapq.heappop(heap)[2]
        excess -= _numbers(linears[name], ranks[name]) - _numbers(linears[name], ranks[name] - 1)
        ranks[name] -= 1
        balance += changes[name][ranks[name]]
        offer(name)
    useful = {
        name: rank if _numbers(linears[name], rank) < linears[name].params else None for name, rank in ranks.items()
    }
    return RankPlan(spec, useful, PLAIN)


def _numbers(linear: LinearSpec, rank: int) -> int:
    """Return what a linear stores at a rank: as factors, or dense where these are no smaller."""
    return min(PLAIN.numbers(linear.out_features, linear.in_features, rank), linear.params)


def _floors(spec: ModelSpec, keep: float) -> dict[str, int]:
    """Return the least rank of each linear, as in the authors' scripts."""
    share = FLOOR if keep <= FLOORED else 0.0
    return {linear.name: max(1, math.ceil(share * int(linear.break_even_rank))) for linear in spec.linears}

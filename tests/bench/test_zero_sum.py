"""The Zero-Sum-SVD-like baseline: its predictions, its plans, its corrections."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lillama.errors import BudgetError
from lillama.lowrank.factors import whitened_svd
from lillama.lowrank.gram import Gram
from lillama.model.describe import describe
from lillama.model.source import load_config
from lillama.model.spec import BlockSpec, LinearSpec, ModelSpec
from lillama.ranks.plan import RankPlan, budget

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from baselines import whole, zero_sum


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 258, (24, 32), generator=torch.Generator().manual_seed(0))


def gram_of(x: Tensor) -> Gram:
    gram = Gram.zeros(x.shape[1], x.device)
    gram.add(x)
    return gram


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_changes_are_those_of_the_papers_formula(shape: tuple[int, int]) -> None:
    chance = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(shape, generator=chance) for _ in range(2))
    x = torch.randn(100, shape[1], generator=chance)
    found = zero_sum.Components.of(weight, gram_of(x), gradient)
    inputs = x.double().T @ x.double()
    root = torch.linalg.cholesky(inputs + zero_sum.DAMPING * inputs.trace() / shape[1] * torch.eye(shape[1]))
    u, s, vh = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    slope = torch.diagonal(u.T @ gradient.double() @ torch.linalg.inv(root).T @ vh.T)
    assert torch.allclose(found.changes, -s * slope, rtol=1e-3, atol=1e-5)
    factors = whitened_svd(weight, gram_of(x), 5)
    assert torch.allclose(found.cut(weight, 5).double(), factors.left @ factors.right, atol=1e-5)
    assert torch.allclose(found.cut(weight, 12), weight, atol=1e-5)


def test_changes_predict_the_loss(tiny: Path, ids: Tensor) -> None:
    model, name = whole.load_whole(tiny, "cpu"), "model.layers.1.mlp.up_proj"
    before, weight = whole.mean_loss(model, ids), model.get_parameter(f"{name}.weight").detach().clone()
    slopes, grams = whole.gradients(model, ids, [name]), whole.input_grams(model, ids, [name])
    found = zero_sum.Components.of(weight, grams[name], slopes[name])
    strongest = int(found.changes.abs().argmax())
    part = found.cut(weight, strongest + 1) - found.cut(weight, strongest)
    whole.put_weights(model, {name: weight - 0.02 * part})
    change = (whole.mean_loss(model, ids) - before) / 0.02
    assert change == pytest.approx(found.changes[strongest].item(), rel=0.1)


def many(count: int = 20) -> tuple[ModelSpec, dict[str, list[float]]]:
    """Return a model of some linears, and changes of both signs that grow with the singular values."""
    shapes = [(24, 16), (16, 16), (16, 40)]
    blocks = []
    for index in range(count):
        linears = tuple(LinearSpec(f"layers.{index}.{n}", *shape) for n, shape in enumerate(shapes))
        blocks.append(BlockSpec(f"layers.{index}", index, sum(one.params for one in linears) + 32, linears))
    params = sum(block.params for block in blocks)
    spec = ModelSpec("Toy", 16, "float32", 4, params + 1000, tuple(blocks))
    chance = torch.Generator().manual_seed(0)
    sizes = torch.arange(16, 0, -1) ** 2 / 256
    return spec, {one.name: (torch.randn(16, generator=chance) * sizes).tolist() for one in spec.linears}


@pytest.mark.parametrize("keep", [0.8, 0.6, 0.45])
def test_a_plan_meets_the_budget_and_its_changes_cancel_out(keep: float, tmp_path: Path) -> None:
    spec, changes = many()
    plan = zero_sum.plan_ranks(spec, changes, keep)
    most = budget(spec, keep, "blocks")
    assert most - 0.01 * spec.block_params < plan.kept_params <= most
    assert all(rank is None or 1 <= rank < linear.break_even_rank for linear, rank in plan)
    assert len(set(plan.ranks.values())) > 3
    plan.save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json", spec, plan.storage) == plan
    gone = sum(sum(changes[name][rank:]) for name, rank in plan.factorised.items())
    assert abs(gone) < 0.1 * sum(sum(map(abs, changes[name][rank:])) for name, rank in plan.factorised.items())


def test_what_matters_more_keeps_more() -> None:
    spec, changes = many()
    first = spec.linears[0].name
    calm = zero_sum.plan_ranks(spec, changes | {first: [change / 100 for change in changes[first]]}, 0.6)
    loud = zero_sum.plan_ranks(spec, changes | {first: [change * 100 for change in changes[first]]}, 0.6)
    assert (calm[first] or 16) < (loud[first] or 16)


def test_few_numbers_leave_each_linear_a_share_of_its_break_even_rank() -> None:
    spec, changes = many()
    quiet = changes | {spec.linears[1].name: [1e-9] * 16}
    assert zero_sum.plan_ranks(spec, quiet, 0.4)[spec.linears[1].name] == 3  # 0.3 of 8, rounded up
    assert zero_sum.plan_ranks(spec, quiet, 0.5)[spec.linears[1].name] == 1
    with pytest.raises(BudgetError, match=r"keep 0\.05 of the blocks"):
        zero_sum.plan_ranks(spec, changes, 0.05)


def test_a_correction_leaves_nothing_along_the_gradient() -> None:
    chance = torch.Generator().manual_seed(0)
    cut, dense, slope = (torch.randn(6, 5, generator=chance) for _ in range(3))
    corrected = zero_sum.correct(cut, dense, slope)
    assert (slope * (dense - corrected)).sum().abs() < 1e-5
    assert (dense - corrected).norm() < (dense - cut).norm()
    assert torch.equal(zero_sum.correct(cut, dense, torch.zeros(6, 5)), cut)


def test_without_a_correction_the_original_is_cut(tiny: Path, ids: Tensor, tmp_path: Path) -> None:
    zero_sum.prepare(tiny, ids, 0.7, tmp_path / "same", stages=1)
    before, after = (LlamaForCausalLM.from_pretrained(folder).state_dict() for folder in (tiny, tmp_path / "same"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_a_plan_leaves_dense_is_the_originals(tiny: Path, ids: Tensor, tmp_path: Path) -> None:
    plan = zero_sum.prepare(tiny, ids, 0.7, tmp_path / "corrected", stages=3)
    before, after = (LlamaForCausalLM.from_pretrained(folder) for folder in (tiny, tmp_path / "corrected"))
    same = {
        linear.name: torch.equal(*(model.get_parameter(f"{linear.name}.weight") for model in (before, after)))
        for linear in plan.spec.linears
    }
    assert plan.factorised and all(same[name] for name in same if plan[name] is None)
    assert not all(same[name] for name in plan.factorised)


def test_a_model_comes_out_as_large_as_planned(tiny: Path, ids: Tensor, text: Path, tmp_path: Path) -> None:
    calibration = {"calibration": str(text), "tokens": 512, "seq_len": 32}
    result = zero_sum.compress(tiny, ids, 0.7, tmp_path / "out", stages=2, device="cpu", **calibration)
    spec = describe(load_config(tiny))
    most = budget(spec, 0.7, "blocks")
    assert most - 0.01 * spec.block_params < result.stored.params <= most
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(weight.numel() for weight in model.parameters()) == result.stored.params

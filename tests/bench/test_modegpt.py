"""The MoDeGPT-like baseline: exact where nothing has to be lost, best where something has, and as large as it says."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lillama.errors import BudgetError, DataError, ModelError
from lillama.model.describe import describe
from lillama.model.source import load_config

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from baselines import modegpt, modules, whole


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 258, (24, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def skewed(make_model) -> Path:
    """A model whose neurons and dimensions differ in what they do, as those of trained models."""
    folder = make_model()
    model, chance = LlamaForCausalLM.from_pretrained(folder), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("up_proj.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight")):
                weight *= torch.randn(len(weight), 1, generator=chance).exp()
    model.save_pretrained(folder)
    return folder


def logits(model: LlamaForCausalLM | Path, ids: Tensor) -> Tensor:
    loaded = AutoModelForCausalLM.from_pretrained(model) if isinstance(model, Path) else model
    with torch.no_grad():
        return loaded(ids).logits


def covariance(*shape: int) -> Tensor:
    x = torch.randn(*shape, 3 * shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x @ x.mT


def test_all_that_is_kept_computes_the_same(tiny: Path, ids: Tensor, tmp_path: Path) -> None:
    kept = modegpt.compress(tiny, ids, 1.0, tmp_path / "out")
    spec = describe(load_config(tiny))
    assert (kept.params, kept.block_params, kept.keep) == (spec.params, spec.block_params, 1)
    assert torch.allclose(logits(tmp_path / "out", ids), logits(tiny, ids), atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a").input_ids


@pytest.mark.parametrize("keep", [0.8, 0.6, 0.4])
def test_as_many_numbers_are_left_as_it_says(skewed: Path, ids: Tensor, tmp_path: Path, keep: float) -> None:
    kept = modegpt.compress(skewed, ids, keep, tmp_path / "out", smoothings=(0.1,))
    spec, model = describe(load_config(skewed)), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = sum(int(model.get_parameter(f"{linear.name}.weight").count_nonzero()) for linear in spec.linears)
    assert keep - 0.01 < kept.keep <= keep
    assert kept.block_params == found + spec.block_params - sum(linear.params for linear in spec.linears)
    assert kept.params == spec.params - spec.block_params + kept.block_params
    written = json.loads((tmp_path / "out" / modegpt.FILE).read_text())
    assert written["block_params"] == kept.block_params and len(written["blocks"]) == 3


def test_neurons_that_repeat_others_are_found_and_cost_nothing(make_model, ids: Tensor) -> None:
    model = LlamaForCausalLM.from_pretrained(make_model())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("gate_proj.weight", "up_proj.weight")):
                weight[1::2] = weight[::2] * (0.3 if "up_proj" in name else 1.0)
    before, shape = logits(model, ids), modegpt.Shape.of(model)
    names = [f"model.layers.{index}" for index in range(3)]
    dense = {name.removesuffix(".weight"): weight.detach().clone() for name, weight in model.named_parameters()}
    found = modegpt.measure(model, shape, names, ids)
    whole.put_weights(
        model, modegpt.smaller(shape, names, dense, found, [replace(shape.whole, neurons=shape.neurons // 2)] * 3)
    )
    assert torch.allclose(logits(model, ids), before, atol=1e-4)
    whole.put_weights(
        model, modegpt.smaller(shape, names, dense, found, [replace(shape.whole, neurons=shape.neurons // 2 - 4)] * 3)
    )
    assert not torch.allclose(logits(model, ids), before, atol=1e-2)


def test_down_is_refitted_by_least_squares() -> None:
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, dtype=torch.float64, generator=chance) @ torch.diag(torch.arange(1.0, 13).double())
    down, kept = torch.randn(5, 12, dtype=torch.float64, generator=chance), torch.tensor([2, 5, 7, 9])
    found = modules.refit(x.T @ x, down, kept)
    best = torch.linalg.lstsq(x[:, kept], x @ down.T).solution
    assert torch.allclose(found.down.T, best, rtol=1e-4)
    assert found.error == pytest.approx((x[:, kept] @ best - x @ down.T).square().sum().item(), rel=1e-6)
    assert modules.reduce_ffn(modules.Neurons.of(x.T @ x), down, 4).error < found.error


def test_values_are_the_best_for_all_heads_that_share_them() -> None:
    chance = torch.Generator().manual_seed(0)
    value = torch.randn(6, 10, dtype=torch.float64, generator=chance)
    outputs, gram = torch.randn(3, 8, 6, dtype=torch.float64, generator=chance), covariance(10)
    whole_rank = modules.reduce_values(gram, value, outputs, 6)
    assert torch.allclose(whole_rank.outputs @ whole_rank.value, outputs @ value)
    found = modules.reduce_values(gram, value, outputs, 2)
    left = (outputs @ value - found.outputs @ found.value).flatten(0, 1)
    singular = torch.linalg.svdvals((outputs @ value).flatten(0, 1) @ torch.linalg.cholesky(gram))
    assert (left @ gram @ left.T).trace().item() == pytest.approx(singular[2:].square().sum().item())


def test_pairs_are_scored_by_the_papers_norms_whatever_the_rotation() -> None:
    queries, key = covariance(2, 8), covariance(1, 8)
    found = modules.score_pairs(queries.diagonal(dim1=1, dim2=2), key.diagonal(dim1=1, dim2=2))

    def norms(gram: Tensor) -> Tensor:
        values, q = torch.linalg.eigh(gram)
        root = (q * values.clamp(min=0).sqrt()[..., None, :]) @ q.mT
        return root.norm(dim=-2).square()

    paired = [norms(gram)[:, :4] + norms(gram)[:, 4:] for gram in (queries, key)]
    assert torch.allclose(found, (paired[0].sum(0) * paired[1]).sqrt())
    angle = torch.tensor(0.7, dtype=torch.float64)
    turn = torch.eye(8, dtype=torch.float64) * angle.cos() + torch.eye(8, dtype=torch.float64).roll(4, 0) * angle.sin()
    turn[:4, 4:] *= -1
    turned = [turn @ gram @ turn.T for gram in (queries, key)]
    again = modules.score_pairs(*(gram.diagonal(dim1=1, dim2=2) for gram in turned))
    assert torch.allclose(turn @ turn.T, torch.eye(8, dtype=torch.float64)) and torch.allclose(again, found)


def test_it_is_better_than_choosing_at_random(skewed: Path, ids: Tensor) -> None:
    model, spec = LlamaForCausalLM.from_pretrained(skewed), describe(load_config(skewed))
    shape, names, before = modegpt.Shape.of(model), [block.name for block in spec], logits(skewed, ids[16:])
    dense = {linear.name: model.get_parameter(f"{linear.name}.weight").detach().clone() for linear in spec.linears}
    found = modegpt.measure(model, shape, names, ids[:16])
    plan = modegpt.plan_widths(shape, spec, [one.influence for one in found], 0.6, math.inf)

    def distance(statistics: list[modegpt.Statistics]) -> float:
        whole.put_weights(model, modegpt.smaller(shape, names, dense, statistics, plan))
        return (logits(model, ids[16:]) - before).square().mean().item()

    def chosen_at_random(seed: int) -> list[modegpt.Statistics]:
        chance = torch.Generator().manual_seed(seed)
        order = modules.Neurons(found[0].neurons.gram, (torch.randperm(shape.neurons, generator=chance),))
        return [
            replace(
                one, pairs=torch.rand(one.pairs.shape, generator=chance), neurons=replace(order, gram=one.neurons.gram)
            )
            for one in found
        ]

    assert 1.1 * distance(found) < min(distance(chosen_at_random(seed)) for seed in range(5))


def test_shares_follow_influence_and_none_is_beyond_the_most() -> None:
    shares = modegpt.shares_removed([0.5, 0.2, 0.1, 0.05], 0.4, 0.1)
    assert sum(shares) / 4 == pytest.approx(0.4)
    assert shares == sorted(shares) and shares[-1] <= modegpt.MOST
    assert modegpt.shares_removed([0.5, 0.2], 0.4, math.inf) == pytest.approx([0.4, 0.4])
    assert modegpt.shares_removed([0.5, 0.2], 0.9, 0.01) == pytest.approx([0.9, 0.9])


def test_the_best_smoothing_is_taken(skewed: Path, ids: Tensor, tmp_path: Path) -> None:
    kept = modegpt.compress(skewed, ids, 0.6, tmp_path / "out", smoothings=(0.02, math.inf))
    assert kept.smoothing == min(kept.losses, key=lambda e: kept.losses[e]) and len(kept.losses) == 2
    held = ids[-(len(ids) // modegpt.HELD_OUT) :]
    found = whole.mean_loss(whole.load_whole(tmp_path / "out", "cpu"), held)
    assert found == pytest.approx(kept.losses[kept.smoothing], rel=1e-5)


def test_what_it_cannot_do_is_refused(tiny: Path, make_model, ids: Tensor, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"keep 0\.01 of the blocks"):
        modegpt.compress(tiny, ids, 0.01, tmp_path / "out")
    with pytest.raises(ModelError, match="without biases"):
        modegpt.compress(make_model(attention_bias=True), ids, 0.8, tmp_path / "out")
    with pytest.raises(DataError, match="one sequence alone"):
        modegpt.compress(tiny, ids[:1], 0.8, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_are_stored_in_the_originals_type(make_model, ids: Tensor, tmp_path: Path) -> None:
    folder = make_model(torch.bfloat16)
    modegpt.compress(folder, ids, 0.8, tmp_path / "out", smoothings=(math.inf,))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16

"""Ranks decided on the way: what the run folder says of them, that a resumed run keeps them, goals instead of shares."""

import json
from math import inf, nan

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lillama.errors import BudgetError, OutputError, RecipeError
from lillama.hub.export import export
from lillama.model.describe import describe
from lillama.pipeline import rank_selection
from lillama.pipeline.api import compress, preview
from lillama.ranks.adaptive import Adaptive
from lillama.ranks.plan import RankPlan
from lillama.ranks.spectra import Spectra

BEST = {"ranks": {"name": "adaptive", "multiple_of": 1}, "init": {"name": "two-sided"}, "storage": {"form": "pivot"}}


@pytest.fixture(scope="module")
def result(tiny, quick, tmp_path_factory):
    recipe = quick(**BEST, keep=0.6, scope="blocks", recover={"epochs": 1})
    return compress(tiny, tmp_path_factory.mktemp("adaptive") / "out", recipe=recipe)


def test_the_run_folder_tells_how_ranks_were_chosen(tiny, result):
    record = json.loads((result.run / "allocation.json").read_text())
    assert [(one["share"], one["narrower"] > 0) for one in record["candidates"]] == [
        (0.0, False), (0.5, False), (1.0, False), (1.0, True),
    ]  # fmt: skip
    best = min(record["candidates"], key=lambda one: one["kl"])
    assert record["chosen"] == best["share"] and best["kl"] > 0
    predicted = [one["predicted"] for one in record["candidates"]]
    assert predicted[2] <= predicted[1] <= predicted[0]
    spectra = Spectra.load(result.run / "spectra.safetensors")
    assert set(spectra.singular) == set(result.plan.ranks)
    assert spectra.rise(result.plan) == pytest.approx(best["predicted"])
    spec = describe(AutoModelForCausalLM.from_pretrained(tiny).config)
    assert RankPlan.load(result.run / "plan.json", spec, result.plan.storage).ranks == result.plan.ranks


def test_the_result_loads_and_its_size_is_what_it_says(result):
    model = AutoModelForCausalLM.from_pretrained(result.path)
    stored = load_file(result.path / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == result.stored.params <= result.plan.kept_params
    assert sum(tensor.nbytes for tensor in stored.values()) == result.stored.bytes
    assert result.held_out.kl > 0 and model.num_parameters() > 0


def test_a_dense_copy_computes_the_same(result, tmp_path):
    export(result.path, tmp_path / "dense", "dense")
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        small, dense = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (result.path, tmp_path / "dense"))
    torch.testing.assert_close(small, dense, rtol=1e-4, atol=1e-4)


def test_an_interrupted_run_decides_once_and_ends_in_the_same_bits(tiny, quick, result, tmp_path, monkeypatch):
    recipe, out, tried = result.recipe, tmp_path / "out", []

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rank_selection.RunContext, "drop_gradients", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compress(tiny, out, recipe=recipe)
    (tmp_path / "out.run" / "blocks" / "0002.json").unlink()
    chosen = rank_selection._pick_plan
    monkeypatch.setattr(rank_selection, "_pick_plan", lambda *args: tried.append(1) or chosen(*args))
    again = compress(tiny, out, recipe=recipe)
    assert not tried and again.plan == result.plan
    files = [folder / "model.safetensors" for folder in (result.path, again.path)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_uniform_ranks_are_taken_where_they_are_better_and_this_is_said(tiny, quick, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(
        rank_selection,
        "_evaluate_plans",
        lambda ctx, gradients, plans, curves: [(0.1, 0.1)] + [(0.2, 0.2)] * (len(plans) - 1),
    )
    result = compress(tiny, tmp_path / "out", recipe=quick(**BEST, distill={"epochs": 0}))
    assert "uniform ranks were better" in caplog.text
    assert json.loads((result.run / "allocation.json").read_text())["chosen"] == 0.0


@pytest.mark.parametrize(("bits", "most"), [(None, 120_000), (8, 84_000)])
def test_bytes_decide_the_size(tiny, quick, tmp_path, bits, most):
    recipe = quick(**(BEST | {"storage": {"form": "pivot", "bits": bits}}), distill={"epochs": 0})
    result = compress(tiny, tmp_path / "out", recipe=recipe, nbytes=most)
    assert 0.96 * most < result.stored.bytes <= most
    assert sum(t.nbytes for t in load_file(result.path / "model.safetensors").values()) == result.stored.bytes


def test_bytes_that_cannot_be_reached_are_refused_and_nothing_is_left(tiny, quick, tmp_path):
    with pytest.raises(BudgetError, match=r"bytes 1,000 are not reachable: the original takes [\d,]+"):
        compress(tiny, tmp_path / "out", recipe=quick(**BEST), nbytes=1000)
    assert not list(tmp_path.iterdir())


def test_a_bound_on_the_loss_decides_the_size(tiny, quick, tmp_path):
    recipe = quick(**BEST, distill={"epochs": 1})
    result = compress(tiny, tmp_path / "out", recipe=recipe, max_loss=0.05)
    assert result.held_out.rise <= 0.05 and result.path == tmp_path / "out"
    assert result.stored.params < result.plan.spec.params
    AutoModelForCausalLM.from_pretrained(result.path)
    again = compress(tiny, tmp_path / "out", recipe=recipe, max_loss=0.05)  # every attempt is read back
    assert again.plan == result.plan and again.held_out == result.held_out


@pytest.mark.parametrize("most", [0.0, -1.0, nan, inf])
def test_senseless_bounds_are_refused(tiny, quick, tmp_path, most):
    with pytest.raises(RecipeError, match=f"max-loss is {most:g}; give nats a token above 0"):
        compress(tiny, tmp_path / "out", recipe=quick(**BEST), max_loss=most)
    assert not list(tmp_path.iterdir())


def test_a_bound_does_not_go_into_the_run_folder_of_one_size(tiny, quick, result):
    before = sorted(path.name for path in result.run.iterdir())
    with pytest.raises(OutputError, match="holds a run of one size; give --max-loss another folder"):
        compress(tiny, result.path, recipe=quick(**BEST), max_loss=0.05)
    assert sorted(path.name for path in result.run.iterdir()) == before


def test_a_preview_shows_ranks_and_a_falling_curve_and_writes_nothing(tiny, quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = quick(**BEST, keep=0.8)
    planned = preview(tiny, recipe=recipe)
    keeps, rises = zip(*planned.curve, strict=True)
    assert list(keeps) == sorted(keeps, reverse=True) and list(rises) == sorted(rises) and len(keeps) > 3
    assert not planned.outline and planned.plan.keep <= 0.8 and isinstance(recipe.ranks, Adaptive)
    assert planned.as_json()["curve"][0] == {"keep": keeps[0], "rise": rises[0]}
    assert planned.rise is not None and rises[keeps.index(0.85)] < planned.rise < rises[keeps.index(0.7)]
    assert not list(tmp_path.iterdir())

"""Narrower FFNs: from a plan to a folder that others load, and back."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from lillama import merge
from lillama.errors import RecipeError
from lillama.hub.export import export
from lillama.model.describe import describe
from lillama.model.source import load_config
from lillama.pipeline.api import compress
from lillama.ranks.plan import RankPlan

DOWN = "model.layers.{}.mlp.down_proj"
IDS = torch.arange(3, 35)[None]


def write_plan(tiny: Path, folder: Path, widths: dict[str, int], **ranks: int) -> Path:
    """Write a plan with these widths, and ranks by the last part of a linear's name."""
    spec = describe(load_config(tiny))
    chosen = {linear.name: ranks.get(linear.name.rpartition(".")[2]) for linear in spec.linears}
    RankPlan(spec, chosen, widths=widths).save(folder / "plan.json")
    return folder / "plan.json"


@pytest.fixture(scope="module")
def result(tiny, quick, tmp_path_factory):
    """A model whose first FFN keeps 24 of 48 neurons, whose last one 40, whose queries have a rank."""
    folder = tmp_path_factory.mktemp("narrow")
    plan = write_plan(tiny, folder, {DOWN.format(0): 24, DOWN.format(2): 40}, q_proj=8)
    return compress(tiny, folder / "out", recipe=quick(recover={"epochs": 1}), rank_plan=plan)


def test_a_plan_decides_the_shapes_that_are_stored(tiny, result):
    stored = load_file(result.path / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == result.stored.params == result.plan.kept_params
    widths = [stored[f"model.layers.{index}.mlp.up_proj.weight"].shape for index in range(3)]
    assert widths == [(24, 32), (48, 32), (40, 32)]
    assert stored[f"{DOWN.format(0)}.weight"].shape == (32, 24)
    section = json.loads((result.path / "config.json").read_text())["quantization_config"]
    assert section["format_version"] == 3 and section["shapes"][DOWN.format(2)] == [32, 40]
    assert set(section["ranks"]) == {f"model.layers.{index}.self_attn.q_proj" for index in range(3)}
    whole = load_file(Path(tiny) / "model.safetensors")
    assert torch.equal(stored[f"{DOWN.format(1)}.weight"], whole[f"{DOWN.format(1)}.weight"]) is False  # it learns too
    assert RankPlan.load(result.run / "plan.json", result.plan.spec, result.plan.storage) == result.plan


@torch.no_grad()
def test_it_loads_everywhere_and_computes_the_same(result, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(result.path)
    wanted = model(IDS).logits
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "again")(IDS).logits, wanted)
    hidden = AutoModel.from_pretrained(result.path)(IDS).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), wanted)
    export(result.path, tmp_path / "dense", "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.model.layers[0].mlp.up_proj.weight.shape == (48, 32)
    torch.testing.assert_close(dense(IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    whole = copy.deepcopy(model)
    merge(whole)
    assert whole.model.layers[0].mlp.down_proj.in_features == 48
    torch.testing.assert_close(whole(IDS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_it_starts_better_than_with_neurons_left_out_at_random(tiny, quick, tmp_path, monkeypatch):
    """Without any training: the order of the neurons is what counts."""
    from lillama.ranks.widths import WidthCurve

    plan = write_plan(tiny, tmp_path, {DOWN.format(index): 24 for index in range(3)})
    untaught = quick(distill={"epochs": 0}, recover={"epochs": 0})
    chosen = compress(tiny, tmp_path / "chosen", recipe=untaught, rank_plan=plan).held_out.kl
    monkeypatch.setattr(WidthCurve, "kept", lambda self, width: self.order[-width:])
    worst = compress(tiny, tmp_path / "worst", recipe=untaught, rank_plan=plan).held_out.kl
    assert 0 < chosen < worst


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"model.layers.0.mlp.up_proj": 24}, "which is the last linear of no FFN"),
        ({DOWN.format(0): 49}, "width 49 of .* is not a whole number from 1 to 48"),
        ({DOWN.format(0): True}, "width True of .* is not a whole number"),
        ({DOWN.format(0): 0}, "width 0 of"),
        ([24], "widths are"),
    ],
)
def test_widths_that_cannot_be_are_refused(tiny, quick, tmp_path, widths, message):
    plan = write_plan(tiny, tmp_path, {})
    content = json.loads(plan.read_text())
    plan.write_text(json.dumps(content | {"widths": widths}))
    with pytest.raises(RecipeError, match=message):
        compress(tiny, tmp_path / "out", recipe=quick(), rank_plan=plan)


def test_a_linear_has_a_rank_or_another_width(tiny, quick, tmp_path):
    plan = write_plan(tiny, tmp_path, {DOWN.format(0): 24}, up_proj=8)
    with pytest.raises(RecipeError, match=r"up_proj has a rank and .* a width"):
        compress(tiny, tmp_path / "out", recipe=quick(), rank_plan=plan)


def test_all_blocks_on_every_batch_narrows_too(tiny, quick, tmp_path):
    plan = write_plan(tiny, tmp_path, {DOWN.format(1): 16})
    result = compress(tiny, tmp_path / "out", recipe=quick(distill={"schedule": "joint"}), rank_plan=plan)
    assert load_file(result.path / "model.safetensors")[f"{DOWN.format(1)}.weight"].shape == (32, 16)

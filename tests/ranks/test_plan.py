import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lillama.errors import RecipeError
from lillama.model.spec import ModelSpec
from lillama.ranks.allocators import Bottom, Uniform
from lillama.ranks.plan import RankPlan, budget


@pytest.fixture
def spec(made_up: Callable[..., ModelSpec]) -> ModelSpec:
    return made_up(3, {"up": (30, 20), "down": (20, 30)}, others=7, outside=500)


def test_the_account_of_a_plan_is_the_sum_over_its_linears(spec: ModelSpec) -> None:
    plan = RankPlan(spec, {linear.name: None for linear in spec.linears} | {"layers.1.up": 4, "layers.2.down": 5})
    assert spec.params == 500 + 3 * (7 + 1200)
    assert plan.kept_params == spec.params - 2 * 600 + 9 * 50
    assert plan.kept_bytes == 2 * plan.kept_params and plan.keep == plan.kept_params / spec.params
    assert plan.factorised == {"layers.1.up": 4, "layers.2.down": 5}
    assert [plan.ranks_within(block) for block in spec] == [{}, {"up": 4}, {"down": 5}]
    assert plan["layers.1.up"] == 4 and plan["layers.1.down"] is None


def test_budget_counts_the_whole_model_or_its_blocks(spec: ModelSpec) -> None:
    assert budget(spec, 0.5, "model") == int(0.5 * spec.params)
    assert budget(spec, 0.5, "blocks") == 500 + int(0.5 * 3 * 1207)
    assert budget(spec, 1.0, "blocks") == budget(spec, 1.0, "model") == spec.params


@pytest.mark.parametrize("allocate", [Uniform(multiple_of=1), Bottom(min_rank=2, step=3)], ids=repr)
def test_a_saved_plan_is_replayed(spec: ModelSpec, allocate: Uniform | Bottom, tmp_path: Path) -> None:
    plan = allocate(spec, 0.7)
    plan.save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json", spec) == plan
    rows = json.loads((tmp_path / "plan.json").read_text())["linears"]
    assert rows[0] == {"name": "layers.0.up", "out": 30, "in": 20, "rank": plan["layers.0.up"]}


def row(**changes: Any) -> dict[str, Any]:
    return {"name": "layers.0.up", "out": 30, "in": 20, "rank": 3} | changes


def test_linears_that_a_file_does_not_name_stay_dense(spec: ModelSpec, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"version": 1, "linears": [row()]}))
    assert RankPlan.load(path, spec).factorised == {"layers.0.up": 3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON .*give a plan that an earlier run saved"),
        ("[]", "a JSON list, where an object"),
        ("\xff\xfe", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ({"linears": [row()]}, "not a rank plan"),
        ({"version": 1}, "not a rank plan"),
        ({"version": 1, "linears": [{"name": "layers.0.up"}]}, "not a rank plan"),
        ({"version": 1, "linears": 3}, "not a rank plan"),
        ({"version": 1, "linears": None}, "not a rank plan"),
        ({"version": 1, "linears": {"layers.0.up": 3}}, "not a rank plan"),
        ({"version": 1, "linears": ["layers.0.up"]}, "layers.0.up is no row with name, out, in and rank"),
        ({"version": 1, "linears": [None]}, "None is no row"),
        ({"version": "1", "linears": []}, "version 1, this"),
        ({"version": ["a\n" * 100], "linears": []}, "version .'a"),
        ({"version": 1, "linears": [row(name=5)]}, "5 is no name of a linear; a text is needed"),
        ({"version": 1, "linears": [row(name=["layers.0.up"])]}, "is no name of a linear"),
        ({"version": 1, "linears": [row(name=None)]}, "None is no name"),
        ({"version": 1, "linears": [row(name="u\n\x1b[31mp" * 1000)]}, "linear .* is not in the model"),
        ({"version": 1, "linears": [row(), row(rank=4)]}, "layers.0.up stands there twice"),
        ({"version": 1, "linears": [row(out="30")]}, "30 x 20 in the plan"),
        ({"version": 1, "linears": [row(**{"in": {}})]}, "30 x {} in the plan"),
        ({"version": 1, "linears": [row(rank=-3)]}, "rank -3 is not"),
        ({"version": 1, "linears": [row(rank=10**30)]}, "rank 10{30} is not"),
        ({"version": 1, "linears": [row(rank=float("nan"))]}, "rank nan is not"),
        ({"version": 1, "linears": [row(rank=[3])]}, "rank .3. is not"),
        ({"version": 2, "linears": [row()]}, "version 2, this lillama reads version 1"),
        ({"version": 1, "linears": [row(name="layers.0.upp")]}, "layers.0.upp is not in the model; did you mean"),
        ({"version": 1, "linears": [row(out=31)]}, "31 x 20 in the plan, 30 x 20 in the model"),
        ({"version": 1, "linears": [row(rank=0)]}, "rank 0 is not a whole number from 1 to 20"),
        ({"version": 1, "linears": [row(rank=21)]}, "rank 21 is not"),
        ({"version": 1, "linears": [row(rank=2.5)]}, "rank 2.5 is not"),
        ({"version": 1, "linears": [row(rank=True)]}, "rank True is not"),
        ({"version": 1, "linears": [row(rank="8")]}, "rank 8 is not"),
    ],
)
def test_a_file_that_is_no_plan_for_this_model_is_refused_in_one_line(
    content: Any, message: str, spec: ModelSpec, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="latin-1")
    with pytest.raises(RecipeError, match=message) as refusal:
        RankPlan.load(path, spec)
    assert str(path) in str(refusal.value) and str(refusal.value).isprintable() and len(str(refusal.value)) < 400


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_no_file_no_plan(name: str, spec: ModelSpec, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot be read .*give a plan"):
        RankPlan.load(tmp_path / name, spec)

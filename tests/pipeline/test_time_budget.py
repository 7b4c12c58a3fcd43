"""Time as a budget: what is chosen, what a resumed run follows, and what is refused. No test waits for a clock."""

import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from lillama.errors import RecipeError
from lillama.pipeline import time_budget
from lillama.pipeline.api import compress
from lillama.pipeline.job import build_job, plan
from lillama.pipeline.time_budget import LEAST_STEPS, Deadline, deadline_of, fit_job
from lillama.pipeline.time_ladder import BUDGETS, LADDER, MOST_EPOCHS, choose, ladder
from lillama.recipes.options import UNASKED, Machine, Overrides, TimeLimit, parse_duration
from lillama.recipes.recipe import Recipe, load_recipe
from lillama.recovery.training import RecoveryTraining
from lillama.runs.run_dir import open_run


def cost(recipe: Recipe) -> float:
    """A machine that takes a millisecond a token, and as long again for each epoch; half as long for one of recovery."""
    local, epochs = recipe.distill.tokens or recipe.calibration.tokens, recipe.recover.epochs
    passes = 0 if recipe.recover.steps is not None else 0.5 * epochs  # a single step takes no time to speak of
    return 1e-3 * (local * (1 + recipe.distill.epochs) + passes * recipe.calibration.tokens)


def test_durations_are_read():
    assert [parse_duration(text) for text in ("90", "90s", "20m", "1h30m", "1.5h", " 2H ")] == [
        90, 90, 1200, 5400, 5400, 7200,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "0", "0m", "soon", "20 m", "1h30", "-5m", "1m1h", "1..5h", "9" * 400, "nan", "inf"]
)
def test_what_is_no_time_is_refused(text):
    if text == "1h30":
        assert parse_duration(text) == 3630
        return
    with pytest.raises(RecipeError, match="give hours, minutes or seconds"):
        parse_duration(text)


def test_estimates_fill_a_part_of_the_time_and_recovery_has_the_rest():
    given = load_recipe(Recipe(), {"calibration": {"sources": [{"path": "text.txt"}]}})
    chosen = choose(given, 90.0, cost)
    # 33 s before recovery, and 66 s for an epoch of recovery: 98 s of the 135 s that both may take by the estimate
    assert (chosen.distill.tokens, chosen.distill.epochs, chosen.calibration.tokens) == (32768, 0, 131072)
    written = choose(Recipe(), 90.0, cost)  # by the model itself, which takes time too: nothing that is not read
    assert (written.distill.tokens, written.calibration.tokens) == (32768, 65536)
    alone = choose(replace(Recipe(), recover=replace(Recipe().recover, epochs=0)), 100.0, cost)
    assert alone.calibration.tokens == alone.distill.tokens == 32768 and alone.distill.epochs == 1
    # An encoder is taught by nothing else: an epoch over 32,768 tokens takes 66 s, of the 63 or 70 s that both may.
    decoder, both = choose(given, 90.0, cost), choose(given, 90.0, cost, stacks=2)
    assert (decoder.distill.epochs, both.distill.epochs, both.distill.tokens) == (0, 0, 32768)
    assert choose(given, 100.0, cost, stacks=2).distill.epochs == 1
    assert choose(Recipe(), 1e-9, cost).calibration.tokens == LADDER[0]
    assert choose(Recipe(), 1e9, cost).calibration.tokens == LADDER[-1]
    assert choose(Recipe(), 1e9, cost, most_tokens=8192).calibration.tokens == 8192
    assert choose(Recipe(), 1e9, cost, most_tokens=1).calibration.tokens == LADDER[0]


def test_more_time_never_means_less_of_anything(tiny, quick):
    rungs = plan(tiny, recipe=quick(recover={"epochs": 1})).ladder
    assert [rung.seconds for rung in rungs] == list(BUDGETS)
    for key in ("tokens", "distill_tokens"):
        found = [getattr(rung, key) for rung in rungs]
        assert found == sorted(found)
    assert all(rung.distill_tokens <= rung.tokens for rung in rungs)


def test_without_anything_to_recover_no_passes_are_promised(tiny, quick):
    planned = plan(tiny, recipe=quick(), keep=1.0)
    assert {rung.recover_epochs for rung in ladder(planned.recipe, planned.plan, cost)} == {0.0}


def test_nothing_said_of_effort_bounds_the_recipe_default_alone():
    assert TimeLimit.of(None, "default", Overrides()) == TimeLimit(UNASKED, asked=False)
    assert TimeLimit.of(None, "default", Overrides(tokens=4096)) is None
    assert TimeLimit.of(None, "paper", Overrides()) is TimeLimit.of(None, Recipe(), Overrides()) is None
    assert TimeLimit.of("20m", "paper", Overrides(tokens=4096)) == TimeLimit(1200.0)


def test_a_bound_that_nobody_asked_for_leaves_alone_what_fits(tiny, quick, tmp_path, monkeypatch):
    bound, recipe = TimeLimit(100.0, asked=False), quick(recover={"epochs": 2}, calibration={"tokens": 8192})
    job = build_job(tiny, recipe, Machine())
    monkeypatch.setattr(time_budget, "cost_of", lambda job, recipe, rate: 100.0)
    assert fit_job(job, bound, tmp_path / "run", restart=False) is job
    monkeypatch.setattr(time_budget, "cost_of", lambda job, recipe, rate: 1e-1 * recipe.calibration.tokens)
    fitted = fit_job(job, bound, tmp_path / "run", restart=False)
    assert fitted.limit == bound and fitted.recipe.calibration.tokens == 2048
    assert deadline_of(bound, 0.0, recipe, 0).most_epochs == 2
    assert deadline_of(TimeLimit(100.0), 0.0, recipe, 0).most_epochs == MOST_EPOCHS
    with open_run(tmp_path / "run", job.identity()):  # begun before, and not bounded
        assert fit_job(job, bound, tmp_path / "run", restart=False) is job


@pytest.mark.parametrize("spoilt", [{}, {"recipe": 1}, {"recipe": {"calibration": {}, "distill": {"tokens": -1}}}])
def test_a_choice_that_cannot_be_read_is_another_run(spoilt, tiny, quick, tmp_path):
    limit, job = TimeLimit(100.0), build_job(tiny, quick(), Machine())
    with open_run(tmp_path / "run", {"time": asdict(limit), **spoilt}):
        assert fit_job(job, limit, tmp_path / "run", restart=False).recipe == job.recipe


def test_plan_tells_the_bound(tiny, monkeypatch):
    assert plan(tiny).limit is None
    monkeypatch.setattr("lillama.recipes.options.UNASKED", 1e-3)
    planned = plan(tiny)
    assert planned.limit == TimeLimit(1e-3, asked=False)
    assert planned.estimate.seconds == 1e-3 and planned.recipe.calibration.tokens == LADDER[0]
    assert planned.as_json()["limit"] == {"seconds": 1e-3, "asked": False}
    assert plan(tiny, tokens=4096).limit is None


def test_steps_fill_what_is_left(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    deadline = Deadline(at=1100.0, seconds=200.0, measured=1000)
    # 100 s left, 8 of them for the result, 3 for the text, 6 for the search and the end, 4 for checks
    assert deadline.steps(step=2.0, check=1.0, checks=8, forward=1e-3, most=100) == 39
    assert deadline.steps(step=2.0, check=1.0, checks=1, forward=1e-3, most=100) == 41
    assert deadline.steps(step=2.0, check=1.0, checks=8, forward=1e-3, most=30) == 30
    assert deadline.steps(step=84.0 / (LEAST_STEPS - 1), check=1.0, checks=8, forward=1e-3, most=30) == 0
    assert Deadline(at=900.0, seconds=200.0).steps(2.0, 1.0, 8, 0.0, 30) == 0


class Killed(BaseException):
    """The end of the process, as far as this one can play it."""


@pytest.fixture
def job(tiny, quick, tmp_path, monkeypatch):
    """Return a function that compresses within some time, on a machine whose rates are given."""
    monkeypatch.setattr(time_budget, "matmul_rate", lambda *_: rates["matmul"])
    monkeypatch.setattr(RecoveryTraining, "time_step", lambda self: (rates["step"], 0.0))
    monkeypatch.setattr("lillama.pipeline.time_ladder.LADDER", (640, 1280))
    monkeypatch.setattr("lillama.pipeline.time_ladder.MEASURED", 0.0)  # the closed form sees half of the text
    rates = {"matmul": 1e9, "step": 1.0}
    recipe = quick(recover={"epochs": 4, "lr": 1e-3})

    def run(name: str, seconds: float = 3000.0, **changes: float):
        rates.update(changes)
        return compress(tiny, tmp_path / name, recipe=recipe, time=seconds)

    return run


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_what_was_chosen_is_in_the_recipe_of_the_result(job):
    result = job("out", step=500.0)
    assert result.recipe.calibration.tokens == 1280 and result.recipe.recover.steps == 5
    assert result.recipe.distill.tokens == 640
    written = json.loads((result.path / "lillama.json").read_text())
    assert written["recipe"] == result.recipe.hash
    assert json.loads((result.run / "recovered" / "log.json").read_text())["steps"] == result.recipe.recover.steps


def test_a_run_that_goes_on_keeps_its_choice_though_the_machine_has_changed(job, tmp_path, monkeypatch):
    whole = job("whole", step=500.0)
    step = RecoveryTraining.step

    def killed(self, *args):
        raise Killed

    monkeypatch.setattr(RecoveryTraining, "step", killed)
    with pytest.raises(Killed):
        job("out", step=500.0)
    monkeypatch.setattr(RecoveryTraining, "step", step)
    again = job("out", matmul=1.0, step=1e-3)  # much slower and much faster by now
    assert again.recipe == whole.recipe
    assert weights(again.path) == weights(whole.path)


def test_where_no_time_is_left_recovery_is_left_out(job):
    result = job("out", step=1e6)
    assert result.recipe.recover.steps == 0 and not (result.run / "recovered").exists()


def test_a_search_has_no_time(tiny, tmp_path):
    with pytest.raises(RecipeError, match="--time 5m and --max-loss"):
        compress(tiny, tmp_path / "out", max_loss=0.1, time="5m")
    assert not list(tmp_path.iterdir())


def test_an_explicit_number_of_steps_is_taken(tiny, quick, tmp_path):
    recipe = quick(recover={"epochs": 1, "steps": 7, "lr": 1e-3})
    result = compress(tiny, tmp_path / "out", recipe=load_recipe(recipe))
    assert json.loads((result.run / "recovered" / "log.json").read_text())["steps"] == 7

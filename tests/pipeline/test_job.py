"""What is decided before work begins."""

import json
from dataclasses import replace

import pytest
import torch

from lillama.errors import RecipeError, ResourceError
from lillama.pipeline import job as job_module
from lillama.pipeline.job import build_job, check_resources, plan, resize_job
from lillama.recipes import options
from lillama.recipes.options import Machine
from lillama.system.memory import MemoryBudget


@pytest.fixture
def job(tiny, quick):
    return build_job(tiny, quick(), Machine())


def test_plan_reads_the_configuration_alone(make_model, quick):
    folder = make_model()
    (folder / "model.safetensors").unlink()
    (folder / "tokenizer.json").unlink()
    planned = plan(folder, recipe=quick())
    assert 0.695 <= planned.plan.keep <= 0.7
    assert planned.estimate.seconds is not None and planned.estimate.seconds > 0


def test_plan_and_work_agree(tiny, quick, job):
    assert plan(tiny, recipe=quick()).plan == job.plan


def test_plan_json_is_the_contract(tiny, quick):
    value = json.loads(json.dumps(plan(tiny, recipe=quick()).as_json()))
    assert value["version"] == 1
    assert set(value) >= {"params", "bytes", "keep", "linears", "estimate"}
    assert set(value["params"]) == set(value["bytes"]) == {"dense", "kept"}
    assert value["keep"] == value["params"]["kept"] / value["params"]["dense"]
    assert value["bytes"] == {name: 4 * count for name, count in value["params"].items()}
    assert len(value["linears"]) == 3 * 7
    assert all(set(row) == {"name", "out", "in", "rank"} for row in value["linears"])
    saved = sum(
        (row["out"] * row["in"] - row["rank"] * (row["out"] + row["in"])) for row in value["linears"] if row["rank"]
    )
    assert value["params"]["dense"] - saved == value["params"]["kept"]
    dense = plan(tiny, recipe=quick(), keep=1.0).as_json()
    assert all(row["rank"] is None for row in dense["linears"])


def test_scope_blocks_counts_blocks_alone(tiny, quick):
    planned = plan(tiny, recipe=quick(), keep=0.5, scope="blocks").plan
    spec = planned.spec
    kept = planned.kept_params - (spec.params - spec.block_params)
    assert kept <= 0.5 * spec.block_params < kept + 0.005 * spec.params


def test_a_replayed_plan_decides_the_size(tiny, quick, job, tmp_path):
    job.plan.save(tmp_path / "plan.json")
    planned = plan(tiny, recipe=quick(keep=0.9, scope="blocks"), rank_plan=tmp_path / "plan.json")
    assert planned.plan == job.plan
    assert (planned.recipe.keep, planned.recipe.scope) == (job.plan.keep, "model")
    with pytest.raises(RecipeError, match=r"--keep 0\.5 and --plan .*plan\.json: each decides"):
        plan(tiny, keep=0.5, rank_plan=tmp_path / "plan.json")


def test_identity_sees_recipe_model_data_and_ranks(job, text, quick, tiny):
    identity = job.identity()
    assert list(identity) == ["time", "recipe", "model", "data", "plan"]
    assert identity["recipe"] == job.recipe.as_dict()
    assert list(identity["data"]) == [str(text)]
    assert json.loads(json.dumps(identity)) == identity
    assert build_job(tiny, quick(), Machine(micro_batch=1), recipe_name="other name").identity() == identity
    assert build_job(tiny, quick(keep=0.6), Machine()).identity()["plan"] != identity["plan"]


def test_a_resized_job_is_the_job_of_that_size(tiny, quick, job):
    assert resize_job(job, quick(keep=0.6)).plan == plan(tiny, recipe=quick(keep=0.6)).plan
    assert resize_job(job, quick(keep=0.6)).identity() == build_job(tiny, quick(keep=0.6), Machine()).identity()


def test_sequences_at_once():
    cpu = torch.device("cpu")
    assert Machine().rows(256, cpu) == options.CPU_TOKENS // 256
    assert Machine().rows(10**9, cpu) == 1
    assert Machine(micro_batch=3).rows(256, cpu) == 3


@pytest.mark.parametrize("machine", [Machine(micro_batch=0), Machine(activation_memory=-1), Machine(shard_bytes=0)])
def test_senseless_machines_are_refused(tiny, quick, machine):
    with pytest.raises(RecipeError, match="must be at least"):
        build_job(tiny, quick(), machine)


def test_room_counts_what_a_run_has_written_already(job, tmp_path, monkeypatch):
    out, run = tmp_path / "out", tmp_path / "not" / "yet" / "run"
    monkeypatch.setattr(job_module, "free_disk", lambda path: job.needs.disk_bytes - 500)
    with pytest.raises(ResourceError, match=str(run)):
        check_resources(job, out, run, 0)
    check_resources(job, out, run, 500)


def test_the_joint_schedule_may_park_in_files(job, tmp_path):
    job = replace(job, memory=MemoryBudget(1, 1))
    with pytest.raises(ResourceError, match="memory"):
        check_resources(job, tmp_path / "out", tmp_path / "run", 0)
    joint = replace(job, recipe=replace(job.recipe, distill=replace(job.recipe.distill, schedule="joint")))
    check_resources(joint, tmp_path / "out", tmp_path / "run", 0)

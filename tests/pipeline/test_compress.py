"""A whole compression of tiny models, from folder to folder."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import lillama
import lillama.calibration.pack
import lillama.pipeline.context
import lillama.pipeline.schedules
from lillama.errors import OutputError, RecipeError
from lillama.pipeline.api import compress
from lillama.recipes.options import Machine
from lillama.runs.run_dir import open_run

CASES = {
    "plain": {},
    "bf16": {"dtype": torch.bfloat16},
    "tied": {"tie_word_embeddings": True},
    "tied-bf16": {"tie_word_embeddings": True, "dtype": torch.bfloat16},
    "biased": {"attention_bias": True, "mlp_bias": True},
}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return tensors


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors*")}


def reference(folder: Path, text: Path, length: int) -> tuple[float, float]:
    """Return perplexity and bits per byte by the full model, one window at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    content = text.read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder)(content, add_special_tokens=False)["input_ids"]
    total = count = 0
    for start in range(0, len(ids) - length + 1, length):
        window = torch.tensor([ids[start : start + length]])
        with torch.no_grad():
            chances = model(window).logits[0, :-1].double().log_softmax(-1)
        total -= chances.gather(1, window[0, 1:, None]).sum().item()
        count += length - 1
    return math.exp(total / count), total / count / math.log(2) * len(ids) / len(content.encode())


@pytest.mark.parametrize(
    ("case", "schedule"), [*((case, "sequential") for case in CASES), ("biased", "joint"), ("tied-bf16", "joint")]
)
def test_end_to_end(make_model, quick, text, tmp_path, case, schedule):
    model = make_model(**CASES[case])
    result = compress(model, tmp_path / "out", recipe=quick(distill={"schedule": schedule}), texts=[text])
    dense, kept = stored(model), stored(result.path)
    assert sum(tensor.numel() for tensor in kept.values()) == result.stored.params
    assert sum(tensor.numel() for tensor in dense.values()) == result.plan.spec.params
    assert 0.695 <= result.plan.keep <= 0.7
    assert {tensor.dtype for tensor in kept.values()} == {tensor.dtype for tensor in dense.values()}
    outside = [name for name in dense if ".layers." not in name]
    assert outside and all(torch.equal(dense[name], kept[name]) for name in outside)
    loaded = AutoModelForCausalLM.from_pretrained(result.path)
    assert loaded.dtype == next(iter(dense.values())).dtype
    (pair,) = result.texts
    for folder, score in ((model, pair.before), (result.path, pair.after)):
        perplexity, bits = reference(folder, text, loaded.config.max_position_embeddings)
        assert score.perplexity == pytest.approx(perplexity, rel=1e-6 if loaded.dtype == torch.float32 else 1e-5)
        assert score.bits_per_byte == pytest.approx(bits, rel=1e-6 if loaded.dtype == torch.float32 else 1e-5)
    assert not (result.run / "joint").exists() and not (result.run / "scratch").exists()
    logs = [json.loads(file.read_text()) for file in sorted((result.run / "blocks").glob("*.json"))]
    assert [log["block"] for log in logs] == [f"model.layers.{index}" for index in range(3)]
    assert all(log["improved"] and log["final"] < log["initial"] for log in logs)


def test_training_beats_the_initialisation_at_the_models_output(tiny, quick, text, tmp_path):
    scores = {}
    for epochs in (0, 5):
        result = compress(tiny, tmp_path / str(epochs), recipe=quick(distill={"epochs": epochs, "lr": 5e-3}))
        dense, small = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny, result.path))
        ids = torch.tensor(AutoTokenizer.from_pretrained(tiny)(text.read_text())["input_ids"][-1280:]).view(40, 32)
        with torch.no_grad():
            a, b = (m.model(ids).last_hidden_state for m in (dense, small))
        scores[epochs] = (a - b).pow(2).mean().item()
    assert scores[5] < 0.85 * scores[0]


@pytest.fixture(scope="module")
def two_blocks(make_model) -> Path:
    return make_model(num_hidden_layers=2)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["sequential", "joint"])
@pytest.mark.parametrize("init", ["svd", "whitened", "random"])
@pytest.mark.parametrize("stream", ["teacher", "student", "both"])
@pytest.mark.parametrize("loss", ["l1-cosine", "mse", "token-mse"])
def test_every_way_of_teaching_improves_every_block(two_blocks, quick, tmp_path, loss, stream, init, schedule):
    teaching = {"loss": {"name": loss}, "stream": stream, "schedule": schedule, "lr": 5e-3}
    recipe = quick(init={"name": init}, distill=teaching, calibration={"tokens": 640}, keep=0.6)
    result = compress(two_blocks, tmp_path / "out", recipe=recipe)
    for file in sorted((result.run / "blocks").glob("*.json")):
        log = json.loads(file.read_text())
        assert log["improved"] and log["final"] < log["initial"], log["block"]


def test_files_of_a_finished_run(tiny, quick, text, tmp_path):
    result = lillama.compress(tiny, tmp_path / "out", recipe=quick(), texts=[text], run=tmp_path / "elsewhere")
    assert {file.name for file in (tmp_path / "elsewhere").iterdir()} == {
        "run.json", "spec.json", "plan.json", "calibration", "blocks", "metrics.json", "machine.json", "lock",
    }  # fmt: skip
    assert {file.name for file in result.path.iterdir()} >= {
        "config.json",
        "tokenizer.json",
        "README.md",
        "lillama.json",
    }
    card = (result.path / "README.md").read_text(encoding="utf-8")
    assert result.recipe.hash in card and f"{result.stored.params:,}" in card and "words" in card
    metrics = json.loads((result.run / "metrics.json").read_text())
    assert metrics["version"] == 1 and metrics["params"] == {
        "dense": result.plan.spec.params,
        "kept": result.stored.params,
    }
    manifest = json.loads((result.run / "calibration" / "manifest.json").read_text())
    assert manifest["seed"] == 0 and manifest["sources"][0]["path"] == str(text)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "elsewhere"}


@pytest.mark.parametrize("given", ["default", "mine.yaml"])
def test_the_card_names_the_recipe_as_it_was_asked_for(tiny, quick, text, tmp_path, given):
    recipe = given
    if given.endswith(".yaml"):
        recipe = tmp_path / given
        recipe.write_text(quick().as_yaml(), encoding="utf-8")
    out = tmp_path / "out"
    compress(tiny, out, recipe=recipe, calibration=[str(text)], tokens=320, seq_len=32)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"`{given}`" in card and str(tmp_path) not in card.replace(str(text), "")


def test_the_card_carries_licence_and_languages(make_model, quick, tmp_path):
    model = make_model()
    (model / "README.md").write_text("---\nlicense: mit\nlanguage: fr\n---\n# M\n", encoding="utf-8")
    compress(model, tmp_path / "out", recipe=quick(distill={"epochs": 0}))
    head = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert "license: mit" in head and "- fr" in head and "base_model" not in head


def test_everything_kept_is_the_original(tiny, quick, tmp_path):
    result = compress(tiny, tmp_path / "out", recipe=quick(), keep=1.0)
    dense, kept = stored(tiny), stored(result.path)
    assert dense.keys() == kept.keys() and all(torch.equal(dense[name], kept[name]) for name in dense)
    assert AutoModelForCausalLM.from_pretrained(result.path).num_parameters() == result.plan.spec.params


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
@pytest.mark.parametrize("ranks", ["bottom", "top"])
def test_dense_blocks_are_the_originals_bits(tiny, quick, tmp_path, ranks, schedule):
    recipe = quick(ranks={"name": ranks, "min_rank": 6, "step": 2}, keep=0.9, distill={"schedule": schedule})
    result = compress(tiny, tmp_path / "out", recipe=recipe)
    dense, kept = stored(tiny), stored(result.path)
    touched = {name.split(".")[2] for name in result.plan.factorised}
    assert touched == {"0"} if ranks == "bottom" else {"2"}
    for name, tensor in dense.items():
        if ".layers." not in name or name.split(".")[2] not in touched:
            assert torch.equal(tensor, kept[name]), name
    assert sum(tensor.numel() for tensor in kept.values()) == result.plan.kept_params


def test_targets_and_ignore_leave_the_rest_dense(tiny, quick, tmp_path):
    recipe = quick(keep=0.9, targets=["mlp.*"], ignore=["*.layers.1.*"])
    result = compress(tiny, tmp_path / "out", recipe=recipe)
    assert {name.split(".")[3] for name in result.plan.factorised} == {"mlp"}
    assert not any(".layers.1." in name for name in result.plan.factorised)
    dense, kept = stored(tiny), stored(result.path)
    assert all(torch.equal(dense[n], kept[n]) for n in dense if ".layers.1." in n)


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
def test_same_seed_same_bits_other_seed_other_bits(tiny, quick, tmp_path, schedule):
    recipe = quick(distill={"schedule": schedule})
    first, second, other = (
        compress(tiny, tmp_path / name, recipe=recipe, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert weights(first.path) == weights(second.path) != weights(other.path)


def test_the_seed_reaches_random_factors(two_blocks, quick, tmp_path):
    recipe = quick(init={"name": "random"}, distill={"epochs": 0})
    first, other = (compress(two_blocks, tmp_path / str(seed), recipe=recipe, seed=seed) for seed in (1, 2))
    assert weights(first.path) != weights(other.path)


def test_the_students_stream_runs_through_the_students(tiny, quick, tmp_path, monkeypatch):
    """What enters each student is what enters its block in the finished model."""
    entered, advance = [], lillama.pipeline.schedules.BlockActivations.advance

    def noted(self, index, student):
        advance(self, index, student)
        entered.append((self.teacher.read(slice(0, 40)), self.student.read(slice(0, 40))))

    monkeypatch.setattr(lillama.pipeline.schedules.BlockActivations, "advance", noted)
    recipe = quick(targets=["*.0.*", "*.2.*"], keep=0.8)  # the block between stays dense
    result = compress(tiny, tmp_path / "out", recipe=recipe)
    ids = lillama.calibration.pack.CalibrationSet.load(result.run / "calibration").ids
    for which, folder in enumerate((tiny, result.path)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            hidden = model.model(ids, output_hidden_states=True).hidden_states
        for index in (0, 1):  # of the last block transformers gives the output after the norm
            torch.testing.assert_close(entered[index][which], hidden[index + 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
def test_activations_on_disk_give_the_same_bits(tiny, quick, text, tmp_path, schedule, monkeypatch):
    recipe = quick(distill={"schedule": schedule})
    host = compress(tiny, tmp_path / "host", recipe=recipe, texts=[text])
    seen = []
    place = lillama.pipeline.context.ActivationPlacement.place
    monkeypatch.setattr(
        lillama.pipeline.context.ActivationPlacement, "place", lambda self, n: seen.append(place(self, n)) or seen[-1]
    )
    disk = compress(tiny, tmp_path / "disk", recipe=recipe, texts=[text], machine=Machine(activation_memory=0))
    assert set(seen) == {"disk"}
    assert weights(host.path) == weights(disk.path) and host.texts == disk.texts


def test_shards_hold_the_same_tensors(tiny, quick, tmp_path):
    one = compress(tiny, tmp_path / "one", recipe=quick())
    many = compress(tiny, tmp_path / "many", recipe=quick(), machine=Machine(shard_bytes=20_000))
    assert len(list(many.path.glob("*.safetensors"))) > 3
    first, second = stored(one.path), stored(many.path)
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    AutoModelForCausalLM.from_pretrained(many.path)


def test_a_saved_plan_is_replayed(tiny, quick, tmp_path):
    first = compress(tiny, tmp_path / "a", recipe=quick(ranks={"name": "bottom", "min_rank": 6, "step": 2}))
    second = compress(tiny, tmp_path / "b", recipe=quick(keep=0.99), rank_plan=first.run / "plan.json")
    assert second.plan == first.plan
    assert second.recipe.keep == first.plan.keep
    with pytest.raises(RecipeError, match="each decides the size"):
        compress(tiny, tmp_path / "c", recipe=quick(), keep=0.5, rank_plan=first.run / "plan.json")
    assert not (tmp_path / "c.run").exists()


def test_an_earlier_result_is_replaced_and_anything_else_refused(tiny, quick, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    first = compress(tiny, out, recipe=quick())
    before = weights(first.path)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds notes\.txt, which would be lost"):
        compress(tiny, out, recipe=quick(), keep=0.6, restart=True)
    assert (out / "notes.txt").read_text() == "mine" and weights(first.path) == before
    (out / "notes.txt").unlink()
    second = compress(tiny, out, recipe=quick(), keep=0.6, restart=True)
    assert weights(second.path) != before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("dear")
    with pytest.raises(OutputError, match="not an earlier result"):
        compress(tiny, foreign, recipe=quick())
    assert [file.name for file in foreign.iterdir()] == ["thesis.tex"] and not (tmp_path / "foreign.run").exists()


@pytest.mark.parametrize("place", [".", "..", "out/.."])
def test_an_out_without_a_name_is_refused(tiny, quick, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError):
        compress(tiny, place, recipe=quick())


@pytest.mark.parametrize("run", ["out", "out/run", "."])
def test_run_folder_and_out_must_not_lie_in_each_other(tiny, quick, tmp_path, run):
    with pytest.raises(OutputError, match="lie in each other"):
        compress(tiny, tmp_path / "out", recipe=quick(), run=tmp_path / run)
    assert not any(tmp_path.iterdir())


def test_another_recipe_model_or_data_in_the_same_run_is_refused(make_model, tiny, quick, text, tmp_path):
    own = tmp_path / "own.txt"
    own.write_bytes(text.read_bytes())
    config = {"calibration": {"sources": [{"path": str(own)}]}}
    out = tmp_path / "out"

    def refused(match, model=tiny, **changes):
        with pytest.raises(OutputError, match=match):
            compress(model, out, recipe=quick(**config), **changes)

    before = weights(compress(tiny, out, recipe=quick(**config)).path)
    refused(r"recipe\.keep = 0\.7, now it is 0\.6", keep=0.6)
    refused(r"recipe\.seed = 0, now it is 1", seed=1)
    refused(r"model\.files", make_model(seed=1))
    other = make_model()
    changed = json.loads((other / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (other / "config.json").write_text(json.dumps(changed))
    refused(r"model\.files", other)
    own.write_text(own.read_text()[::-1])
    refused(f"data.{own}")
    assert weights(out) == before
    again = compress(tiny, out, recipe=quick(**config), keep=0.6, restart=True)
    assert weights(out) != before and again.plan.keep <= 0.6


def test_another_tokenizer_is_refused(make_model, quick, tmp_path):
    model = make_model()
    compress(model, tmp_path / "out", recipe=quick(distill={"epochs": 0}))
    file = model / "tokenizer.json"
    value = json.loads(file.read_text())
    vocabulary = value["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(value))
    with pytest.raises(OutputError, match=r"model\.tokenizer"):
        compress(model, tmp_path / "out", recipe=quick(distill={"epochs": 0}))


def test_a_run_folder_in_use_is_refused(tiny, quick, tmp_path):
    with open_run(tmp_path / "out.run", {}), pytest.raises(OutputError, match="another process"):
        compress(tiny, tmp_path / "out", recipe=quick(), restart=True)


def test_self_calibration_needs_no_text(tiny, quick, tmp_path):
    result = compress(tiny, tmp_path / "out", recipe=quick(), calibration=["self"], tokens=320)
    manifest = json.loads((result.run / "calibration" / "manifest.json").read_text())
    assert manifest["kind"] == "self" and manifest["tokens"] == 320
    assert "written by the model itself" in (result.path / "README.md").read_text()


def test_one_sequence_serves_for_both_with_a_warning(tiny, quick, tmp_path, caplog):
    compress(tiny, tmp_path / "out", recipe=quick(calibration={"tokens": 32}))
    assert "one calibration sequence only" in caplog.text


def test_nothing_is_taught_twice(tiny, quick, text, tmp_path, monkeypatch):
    first = compress(tiny, tmp_path / "out", recipe=quick())
    monkeypatch.setitem(lillama.pipeline.compress.SCHEDULES, "sequential", None)
    again = compress(tiny, tmp_path / "out", recipe=quick(), texts=[text])
    assert weights(first.path) == weights(again.path) and len(again.texts) == 1


def test_progress_tells_of_every_stage(tiny, quick, text, tmp_path):
    told = []
    compress(tiny, tmp_path / "out", recipe=quick(), texts=[text], report=told.append)
    assert {p.task for p in told} == {"calibration", "blocks", "steps", "taught", "perplexity"}
    taught = [p.detail for p in told if p.task == "taught"]
    assert len(taught) == 3 and all(
        re.fullmatch(r"model\.layers\.\d: held-out loss [\d.]+ -> [\d.]+", t) for t in taught
    )
    assert [(p.done, p.total) for p in told if p.task == "blocks"] == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_the_result_tells_how_well_its_pivots_stand(tiny, quick, tmp_path):
    plain = compress(tiny, tmp_path / "plain", recipe=quick(distill={"epochs": 0}))
    assert plain.pivots == {} and plain.as_json()["pivots"] is None
    pivot = compress(tiny, tmp_path / "pivot", recipe=quick(distill={"epochs": 0}, storage={"form": "pivot"}))
    told = json.loads((tmp_path / "pivot" / "lillama.json").read_text())["pivots"]
    assert set(pivot.pivots) == set(pivot.plan.factorised) and told["linears"] == len(pivot.pivots)
    assert told["condition"] == max(found.condition for found in pivot.pivots.values()) >= 1
    assert 0 < told["largest_coefficient"] <= 1.1

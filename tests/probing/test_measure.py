"""From a model to its figures, from Python and from the command line."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import lillama
from lillama.cli.app import main
from lillama.errors import ModelError, ProbeError
from lillama.evaluation.intervals import Interval
from lillama.pipeline.api import compress
from lillama.probing.benchmark import built_in_sets, load_benchmark
from lillama.probing.judge import judge
from lillama.probing.measure import probe
from lillama.probing.trials import write_trials


def run(*words: object, status: int = 0) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    assert exit_.value.code == status


def test_a_model_that_knows_nothing_ties(make_model, farm):
    folder = make_model()
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(folder)
    found = probe(folder, farm)
    assert (found.overall, found.groups, found.ties, found.identical) == (0.5, {"number": 0.5, "order": 0.5}, 3, 0)
    assert probe(folder, farm, score="sum").groups == {"number": 0.5, "order": 0.5}  # the shorter text of a pair wins
    assert probe(folder, farm, score="sum").ties == 1


def test_a_model_that_was_taught_finds_the_right_text(make_model, farm):
    folder = make_model()
    model = AutoModelForCausalLM.from_pretrained(folder)
    trial = probe(folder, farm).trials[2]
    ids = torch.tensor([[0, *lillama.probing.scorer.load_tokenizer(folder)(trial.pair.good)["input_ids"]]])
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(folder)
    assert probe(folder, farm).groups["order"] == 1.0


@pytest.mark.parametrize("scoring", [{}, {"score": "sum"}, {"score": "penalised", "unit": "char"}])
def test_written_trials_are_judged_the_same(tiny, bert, farm, tmp_path, scoring):
    for model in (tiny, bert):
        found = probe(model, farm, **scoring)
        for name in ("trials.csv", "trials.tsv"):
            write_trials(tmp_path / name, load_benchmark(farm), found.trials)
            again = judge(tmp_path / name, farm)
            assert (again.overall, again.groups, again.interval) == (found.overall, found.groups, found.interval)
            assert [(t.good, t.bad) for t in again.trials] == [(t.good, t.bad) for t in found.trials]


def test_a_model_against_itself_has_not_changed(tiny, farm):
    found = probe(tiny, farm, against=tiny)
    for accuracy in (found.total, found.breakdowns["type"][0]):
        assert (accuracy.dense, accuracy.difference) == (accuracy.score, 0.0)
        assert accuracy.difference_interval == Interval(0.0, 0.0, 0.0)
    zero = {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found.as_json()["compared"] == {"dense": found.overall, "difference": 0.0, "interval": zero}


def test_compressed_models_are_asked_as_they_are(tiny, farm, quick, tmp_path):
    small = compress(tiny, tmp_path / "small", recipe=quick(distill={"epochs": 0})).path
    full = AutoModelForCausalLM.from_pretrained(small)
    trial = probe(small, farm, score="sum", against=tiny).trials[0]
    ids = torch.tensor([[0, *lillama.probing.scorer.load_tokenizer(small)(trial.pair.good)["input_ids"]]])
    with torch.no_grad():
        wanted = -full(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert trial.good == pytest.approx(wanted, rel=1e-5)


def test_pairs_of_the_same_tokens_are_ties_and_counted(tiny, farm, write_table):
    row = {"id": 1, "type": "t", "sentence": "the sheep", "non sentence": "the sheep"}
    write_table("farm.csv", [row, row | {"id": 2, "non sentence": "the sheeps"}])
    found = probe(tiny, farm)
    assert (found.identical, found.ties, len(found.trials)) == (1, 1, 2)
    assert "same text or same tokens twice, counts half: 1 of 2 trials" in found.notes


def test_the_template_stands_around_every_text(tiny, farm):
    plain = probe(tiny, farm)
    farm.write_text(farm.read_text() + "template: 'see: {}'\n", encoding="utf-8")
    assert [t.good for t in probe(tiny, farm).trials] != [t.good for t in plain.trials]
    assert [t.pair for t in probe(tiny, farm).trials] == [t.pair for t in plain.trials]


def test_the_command_prints_json_a_table_and_trials(tiny, farm, tmp_path, capsys):
    run("probe", tiny, "--benchmark", farm, "--json", "--trials-out", tmp_path / "trials.csv", "--device", "cpu")
    value = json.loads(capsys.readouterr().out)
    assert value["version"] == 2 and value["chance"] == 0.5 and value["pairs"] == value["trials"] == value["items"] == 3
    assert (value["benchmark"], value["model"], value["score"], value["unit"]) == ("farm", str(tiny), "mean", "token")
    assert set(value["groups"]) == {"number", "order"} and value["interval"]["value"] == value["overall"]
    assert value["interval"]["low"] <= value["overall"] <= value["interval"]["high"]
    run("probe", "--trials", tmp_path / "trials.csv", "--benchmark", farm, "--json")
    again = json.loads(capsys.readouterr().out)
    assert {key: again[key] for key in ("overall", "groups", "interval", "ties")} == {
        key: value[key] for key in ("overall", "groups", "interval", "ties")
    }
    run("probe", tiny, "--benchmark", farm, "--against", tiny)
    printed = capsys.readouterr().out
    for word in (
        "farm: 3 pairs",
        "by type",
        "number",
        "overall",
        "chance",
        "dense",
        "change",
        "+0.0",
        "note: no column subtype",
    ):
        assert word in printed, word


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["{model}", "--benchmark", "blimpp"], "benchmark blimpp: neither .*; did you mean 'blimp'?"),
        (["{model}", "--benchmark", "blimp"], "comes without data: give the folder that holds"),
        (["{model}", "--benchmark", "blimp", "--data", "{empty}"], "no file .*jsonl here"),
        (["{model}", "--benchmark", "{farm}", "--trials", "{farm}"], "but not both"),
        (["{model}", "--benchmark", "{farm}", "--batch-tokens", "0"], "batch_tokens is 0"),
        (["{model}", "--benchmark", "{farm}", "--score", "median"], "median"),
        (["{model}", "--data", "{empty}"], "--data needs --benchmark"),
        (["{model}x", "--benchmark", "{farm}"], "no such folder"),
        (["--trials", "none.csv", "--benchmark", "{farm}"], "none.csv"),
        (["--trials", "none.csv"], "need --benchmark"),
        (["--probabilities", "none.txt", "--benchmark", "{farm}"], "together with their gold table"),
        (["{model}", "--benchmark", "{farm}", "--trials-out", "{empty}/none/t.csv"], "none: no such folder; make it"),
        ([], "give a MODEL to probe"),
    ],
)
def test_bad_options_are_one_line(tiny, farm, tmp_path, capsys, words, match):
    (tmp_path / "empty").mkdir()
    run("probe", *(word.format(model=tiny, farm=farm, empty=tmp_path / "empty") for word in words), status=2)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    with pytest.raises(ProbeError, match=match):
        raise ProbeError(error)


@pytest.mark.skipif(not built_in_sets(), reason="no set comes with data yet")
def test_without_a_benchmark_all_sets_that_come_with_lillama_are_used(tiny, capsys):
    run("probe", tiny, "--json", "--score", "sum")
    value = json.loads(capsys.readouterr().out)
    assert [found["benchmark"] for found in value["results"]] == built_in_sets()
    for found in value["results"]:
        assert found["pairs"] == found["trials"] and 0.2 < found["overall"] < 0.8  # random weights


def test_trials_replace_no_file(tiny, farm, tmp_path, capsys):
    given = ["probe", "--trials", tmp_path / "given.csv", "--benchmark", farm, "--trials-out"]
    write_trials(tmp_path / "given.csv", load_benchmark(farm), probe(tiny, farm).trials)
    (tmp_path / "nowhere.csv").symlink_to("none")
    before = (tmp_path / "given.csv").read_bytes()
    for name in ("given.csv", "nowhere.csv"):
        run(*given, tmp_path / name, status=2)
        assert f"{name}: exists already; remove it" in capsys.readouterr().err
    assert (tmp_path / "given.csv").read_bytes() == before
    run(*given, tmp_path / "new.csv")
    assert (tmp_path / "new.csv").read_bytes() == before


def test_a_class_that_is_not_transformers_own_needs_its_code(tiny, farm, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    changes = {"architectures": ["Odd"], "auto_map": {"AutoModelForCausalLM": "odd.Odd"}}
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError, match=r"needs code of its own .*odd\.Odd.*--trust-remote-code"):
        probe(folder, farm)

"""The bench: what it counts, what it refuses, and that two models really take turns in processes of their own."""

import json
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel

from lillama.cli.app import main
from lillama.cli.bench import _tables
from lillama.errors import ModelError, RecipeError, ResourceError
from lillama.evaluation import speed_worker as timed
from lillama.evaluation.speed import SpeedComparison, Spread, Subject, Workload, benchmark, in_turn, process, subject
from lillama.evaluation.speed_worker import Footprint, Moment, Setting, TimedRun
from lillama.lowrank.install import install
from lillama.modeling.quantizer import LowRankConfig, declare

SETTING = Setting("cpu", None, 1, 0)


@pytest.fixture(scope="session")
def small(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with low-rank layers of zeros."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    ranks = {"model.layers.0.mlp.up_proj": 8, "model.layers.2.self_attn.q_proj": 4}
    install(model, ranks)
    declare(model, LowRankConfig(ranks=ranks))
    folder = tmp_path_factory.mktemp("small") / "model"
    model.save_pretrained(folder)
    return folder


def test_the_json_is_the_contract(small, tiny, capsys):
    words = [
        "--against",
        str(tiny),
        "--batch",
        "1",
        "2",
        "--prompt",
        "5",
        "--new",
        "3",
        "--repeats",
        "2",
        "--threads",
        "1",
    ]
    with pytest.raises(SystemExit, match="0"):
        main(["bench", str(small), *words, "--device", "cpu", "--dtype", "bfloat16", "--json"])
    value = json.loads(capsys.readouterr().out)
    assert set(value) == {"version", "conditions", "model", "against", "cells"} and value["version"] == 1
    assert value["conditions"].items() >= {"device": "cpu", "threads": 1, "seed": 0, "repeats": 2}.items()
    for role, folder in (("model", small), ("against", tiny)):
        assert value[role]["name"] == str(folder) and value[role]["dtype"] == "bfloat16"
        assert value[role]["disk_bytes"] == (folder / "model.safetensors").stat().st_size
        assert value[role]["peak_bytes"] > value[role]["idle_bytes"] > 0
    saved = 48 * 32 + 32 * 32 - 8 * (48 + 32) - 4 * (32 + 32)
    assert value["against"]["numbers"] - value["model"]["numbers"] == saved
    assert [(cell["batch"], cell["prompt"], cell["new"]) for cell in value["cells"]] == [(1, 5, 3), (2, 5, 3)]
    for cell in value["cells"]:
        assert set(cell["ratios"]) == {"prefill", "decode", "prefill_processor", "decode_processor"}
        for part in (cell["model"], cell["against"], cell["ratios"]):
            assert all(0 < spread["min"] <= spread["median"] <= spread["max"] for spread in part.values())


def test_one_model_prints_a_table_without_ratios(tiny, capsys):
    run = TimedRun(Moment(0.5, 0.5), Moment(1.0, 1.0))
    cells = (Workload(1, 4, 2, ((run,),)),)
    result = SpeedComparison((Subject("alone", tiny, 7, 7),), (Footprint("float32", 9, 2),), cells, {})
    _tables(result)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("first token, ms", "prefill, tokens/s", "decode, tokens/s", "peak memory"))
    assert "500.0" in printed and "ratio" not in printed and "times as fast" not in printed
    assert "against" not in json.dumps(result.as_json())


def test_figures_and_ratios_are_what_they_say():
    own = tuple(
        TimedRun(Moment(first, 2 * first), Moment(rest, rest)) for first, rest in ((0.5, 1.0), (1.0, 2.0), (0.25, 4.0))
    )
    other = tuple(
        TimedRun(Moment(first, first), Moment(rest, rest)) for first, rest in ((1.0, 2.0), (4.0, 2.0), (0.25, 2.0))
    )
    cell = Workload(batch=4, prompt=100, new=11, runs=(own, other))
    figures = cell.figures(0)
    assert figures["first_token_seconds"] == Spread(0.25, 0.5, 1.0)
    assert figures["prefill_tokens_per_second"] == Spread(400, 800, 1600)
    assert figures["decode_tokens_per_second"] == Spread(10, 20, 40)  # the first of the 11 belongs to the prompt
    assert cell.ratios()["prefill"] == Spread(1, 2, 4)
    assert cell.ratios()["prefill_processor"] == Spread(0.5, 1, 2)
    assert cell.ratios()["decode"] == Spread(0.5, 1, 2)


def test_runs_alternate_after_a_warm_up_of_each():
    asked: list[tuple] = []

    def model(name: str) -> Callable[..., TimedRun]:
        return lambda function, *work: (
            asked.append((name, function, *work)) or TimedRun(Moment(len(asked), 0.0), Moment(0.0, 0.0))
        )

    runs = in_turn([model("a"), model("b")], 2, 7, 5, repeats=3)
    assert asked[:2] == [("a", timed.run, 2, 7, 2), ("b", timed.run, 2, 7, 2)]
    assert asked[2:] == [(name, timed.run, 2, 7, 5) for _ in range(3) for name in "ab"]
    assert [[run.first.clock for run in runs[index]] for index in (0, 1)] == [[3, 5, 7], [4, 6, 8]]


def test_a_process_that_is_ended_from_outside_is_one_line(tiny):
    with process(subject(tiny, 4, 2), SETTING) as call:
        assert call(timed.footprint).idle_bytes == call(timed.footprint).idle_bytes  # the same process, loaded once
        (worker,) = (child for child in psutil.Process().children() if "--multiprocessing-fork" in child.cmdline())
        worker.kill()
        with pytest.raises(ResourceError, match=r"ended from outside.*--batch"):
            call(timed.footprint)


@pytest.fixture
def watched(monkeypatch) -> list[list[int]]:
    """Return a list that collects the shapes of what every `Stopwatch` is handed."""
    shapes: list[list[int]] = []
    put = timed.Stopwatch.put

    def noting(self: timed.Stopwatch, value: torch.Tensor) -> None:
        shapes.append(list(value.shape))
        put(self, value)

    monkeypatch.setattr(timed.Stopwatch, "put", noting)
    return shapes


def test_a_run_writes_every_token_whatever_the_model_wants(make_model, watched):
    folder = make_model(eos_token_id=list(range(258)))  # each token would end the text
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"num_beams": 3, "do_sample": True, "temperature": 0.5, "max_new_tokens": 2}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    result = timed.run(str(folder), SETTING, 3, 6, 9)
    assert watched == [[3, 6], *[[3]] * 9]
    assert result.first.clock > 0 and result.rest.clock > 0 and result.rest.processor > 0


def test_weights_that_are_missing_are_not_made_up(make_model):
    from safetensors.torch import load_file, save_file

    folder = make_model()
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"tensor model.layers.1.mlp.up_proj.weight is missing"):
        timed.load_subject(str(folder), SETTING)


def test_a_model_keeps_its_type_or_takes_the_wanted(make_model):
    folder = str(make_model(torch.bfloat16))
    assert timed.footprint(folder, SETTING).dtype == "bfloat16"
    assert timed.footprint(folder, Setting("cpu", "float32", 1, 0)).dtype == "float32"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"prompt": [8, 100], "new": 29}, r"prompt of 100 and 29 new tokens make 129.*128 positions; lower --prompt or --new"),
        ({"batch": [2, 0]}, "batch is 0; it must be at least 1"),
        ({"prompt": []}, "prompt is 0"),
        ({"new": 1}, "new is 1; it must be at least 2"),
        ({"repeats": 0}, "repeats is 0"),
        ({"threads": -1}, "threads is -1"),
        ({"device": "tpu9"}, "tpu9.*choose another --device"),
        ({"against": "no/such/folder"}, "no such folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused_before_a_process_starts(tiny, monkeypatch, options, line):
    monkeypatch.setattr("lillama.evaluation.speed.process", lambda *_: pytest.fail("a process was started"))
    with pytest.raises((ModelError, RecipeError, ResourceError), match=line):
        benchmark(tiny, **{"prompt": [8], "new": 2} | options)


def test_a_model_without_head_is_refused(tmp_path):
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    LlamaModel(LlamaConfig(**shape)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="LlamaModel has no language-model head"):
        subject(tmp_path, 4, 2)


def test_damaged_weights_are_refused(make_model):
    folder = make_model()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="truncated"):
        subject(folder, 4, 2)

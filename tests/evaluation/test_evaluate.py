"""Everything in one call, and what the command line makes of it."""

import json
import sys
from pathlib import Path

import pytest

from lillama.cli.app import main
from lillama.errors import DataError, RecipeError
from lillama.evaluation.agreement import Protocol
from lillama.evaluation.evaluate import evaluate
from lillama.evaluation.perplexity import perplexity

SHORT = Protocol(seq_len=32, windows=10, prompts=4)


@pytest.fixture(scope="module")
def other(make_model):
    return make_model(seed=1)


@pytest.fixture
def texts(text, tmp_path):
    """Three texts, two of them in one language."""
    content = text.read_text(encoding="utf-8")
    for name, part in (("a", content[:1000]), ("b", content[1000:3000]), ("c", content[3000:])):
        (tmp_path / f"{name}.txt").write_text(part)
    return [f"eng={tmp_path}/a.txt", f"{tmp_path}/b.txt", f"eng={tmp_path}/c.txt"]


def run(capsys, *words, status=0):
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    assert exit_.value.code == status
    return capsys.readouterr()


def test_alone_it_is_perplexity_and_a_row_for_each_language(tiny, texts):
    found = evaluate(tiny, texts, protocol=SHORT, device="cpu")
    assert list(found.texts) == perplexity(tiny, texts, seq_len=32, windows=10, device="cpu")
    (english,) = found.languages
    assert (english.name, english.tokens) == ("eng", found.texts[0].tokens + found.texts[2].tokens)
    assert found.as_json().keys() == {"version", "texts", "languages"}
    assert found.agreements == found.tasks == ()


def test_beside_the_dense_model_every_difference_has_an_interval(tiny, other, texts):
    found = evaluate(other, texts, against=tiny, protocol=SHORT, device="cpu")
    alone = evaluate(other, texts, protocol=SHORT, device="cpu")
    assert found.texts == alone.texts
    assert found.languages[0].nll == pytest.approx(alone.languages[0].nll)
    value = found.as_json()
    assert value["against"] == str(tiny) and [row["name"] for row in value["texts"]] == ["a", "b", "c"]
    for row in (*value["texts"], *value["languages"]):
        assert row.keys() == {"name", "tokens", "perplexity", "bits_per_byte", "against"}
        against = row["against"]
        differences = [
            against["excess_loss"], against["excess_bits_per_byte"], against["kl"], against["top1"],
            against["calibration_error"]["difference"], against["continuation"]["repetition"]["difference"],
        ]  # fmt: skip
        for one in differences:
            assert one.keys() == {"value", "low", "high"} and one["low"] <= one["high"]
    assert value["languages"][0]["against"]["continuation"]["prompts"] == 8
    assert value["languages"][0]["against"]["windows"] == 20
    for row in value["texts"]:
        samples = row["against"]["continuation"]["samples"]
        assert 0 < len(samples) <= 4 and all(one.keys() == {"prompt", "same", "dense", "model"} for one in samples)
        content = Path(str(texts["abc".index(row["name"])]).removeprefix("eng=")).read_text(encoding="utf-8")
        assert all(one["prompt"] in content for one in samples)
    assert value["languages"][0]["against"]["continuation"]["samples"] == []
    json.dumps(value, allow_nan=False)


def test_the_command_prints_json_and_tables(tiny, other, texts, capsys):
    words = ["evaluate", other, "--against", tiny, "--text", texts[0], "--seq-len", 32, "--windows", 3, "--prompts", 2,
             "--stride", 16, "--seed", 5, "--device", "cpu"]  # fmt: skip
    value = json.loads(run(capsys, *words, "--json").out)
    protocol = Protocol(seq_len=32, stride=16, windows=3, prompts=2, seed=5)
    assert value == evaluate(other, texts[0], against=tiny, protocol=protocol, device="cpu").as_json()
    printed = run(capsys, *words)
    assert printed.err == ""
    for word in ("excess loss", "KL", "calibration", "repeated", "eng", f"{value['texts'][0]['perplexity']:.3f}"):
        assert word in printed.out


def test_tasks_stand_beside_texts(tiny, texts, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"q": f"is {i}", "a": i % 2}) for i in range(6)))
    task = tmp_path / "even.yaml"
    task.write_text(
        f"task: even\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "doc_to_choice: ['even', 'odd']\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    words = ["evaluate", tiny, "--against", tiny, "--tasks", task, "--limit", 4, "--device", "cpu"]
    value = json.loads(run(capsys, *words, "--json").out)
    assert value["texts"] == []
    (row,) = value["tasks"]
    assert (row["task"], row["metric"], row["documents"]) == ("even", "acc", 4)
    assert row["against"]["difference"] == {"value": 0, "low": 0, "high": 0}
    assert "even" in run(capsys, *words, "--text", texts[0], "--seq-len", 32, "--prompts", 0).out


def test_nothing_to_measure_is_refused(tiny):
    with pytest.raises(RecipeError, match=r"give --text FILE \.\.\. or --tasks NAME"):
        evaluate(tiny)


def test_a_task_that_is_not_there_is_told_before_work_begins(tiny, texts, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("lillama.evaluation.evaluate.perplexity", None)
    with pytest.raises(RecipeError, match="no such task file"):
        evaluate(tiny, texts, tasks="nowhere.yaml")


def test_mistakes_are_one_line(tiny, texts, capsys, tmp_path):
    for words, match in (
        (["--against", tmp_path / "none"], "no such folder"),
        (["--stride", "99", "--seq-len", "32"], "stride is 99"),
        (["--tasks", tmp_path / "none.yaml"], "task"),  # no such file, or no lm_eval
    ):
        error = run(capsys, "evaluate", tiny, "--text", texts[0], "--device", "cpu", *words, status=2).err
        assert error.startswith("error: ") and error.count("\n") == 1 and match in error


def test_an_empty_text_is_refused_beside_the_dense_model_too(tiny, tmp_path):
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(DataError, match="one: 1 tokens"):
        evaluate(tiny, tmp_path / "one.txt", against=tiny, device="cpu")


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(RecipeError, match=r"lm_eval.*pip install 'lillama\[eval\]'"):
        evaluate("nowhere", tasks="lillama")

"""Tasks of the lm-evaluation-harness over local files."""

import json
import math
from pathlib import Path

import pytest
import torch

from lillama.errors import RecipeError
from lillama.evaluation import harness
from lillama.evaluation.harness import Task, find_tasks
from lillama.evaluation.perplexity import perplexity
from lillama.evaluation.tasks import score_tasks

pytest.importorskip("lm_eval")

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}, {{metric: f1}}]
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
- {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
- {{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
"""
ABSENT = """
task: absent
dataset_path: nobody/has-this-data
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: ["a", "b"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two multiple-choice tasks and a perplexity over 24 documents."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"fade {i} cab", "choices": ["yes", "no"], "answer": i % 2} for i in range(24)]
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, text in (("first", CHOICE), ("second", CHOICE), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(name=name, data=data))
    return folder


@pytest.fixture(scope="module")
def found(folder) -> list[Task]:
    return find_tasks([str(folder / f"{name}.yaml") for name in ("first", "rolling")])


def by_key(scores):
    return {(score.task, score.metric): score for score in scores}


def test_a_model_scores_as_itself(tiny, found):
    scores = by_key(score_tasks(tiny, found, tiny, device="cpu"))
    assert set(scores) == {
        ("first", "acc"),
        ("first", "f1"),
        ("rolling", "bits_per_byte"),
        ("rolling", "byte_perplexity"),
    }
    for score in scores.values():
        assert score.documents == 24 and score.dense == score.value.value and score.difference.value == 0
    accuracy = scores["first", "acc"]
    assert accuracy.difference.low == accuracy.difference.high == 0
    assert 0 <= accuracy.value.low <= accuracy.value.value <= accuracy.value.high <= 1
    bits = scores["rolling", "bits_per_byte"].value
    assert bits.low < bits.value < bits.high
    assert scores["rolling", "byte_perplexity"].value.low == pytest.approx(2**bits.low, rel=0.05)


def test_differences_are_paired_and_follow_the_seed(tiny, make_model, found):
    other = make_model(seed=1)
    one, same = (by_key(score_tasks(other, found, tiny, device="cpu", limit=20, seed=seed)) for seed in (0, 0))
    assert one == same
    bits = one["rolling", "bits_per_byte"]
    assert bits.documents == 20 and bits.difference.value == pytest.approx(bits.value.value - bits.dense)
    assert bits.difference.low < bits.difference.value < bits.difference.high


def test_bits_of_the_harness_are_ours(tiny, found, tmp_path):
    """One document, read from a beginning-of-text token on: the harness's convention."""
    (score,) = [one for one in score_tasks(tiny, found[1:], device="cpu", limit=1) if one.metric == "bits_per_byte"]
    file = tmp_path / "one.txt"
    file.write_text("<s>fade 0 cab")
    (ours,) = perplexity(tiny, file, device="cpu")
    assert ours.tokens == len("fade 0 cab")
    assert score.value.value == pytest.approx(ours.nll / math.log(2), rel=1e-4)
    assert score.value.low is None  # one document


def test_the_suite_reports_one_metric_each_and_their_average(tiny, make_model, folder, monkeypatch):
    names = {str(folder / f"{name}.yaml"): "acc" for name in ("first", "second")}
    monkeypatch.setattr(harness, "METRICS", names)
    scores = score_tasks(make_model(seed=1), find_tasks("lillama"), tiny, device="cpu")
    first, second, average = scores
    assert [(score.task, score.metric) for score in scores[:2]] == [("first", "acc"), ("second", "acc")]
    assert average.task == "average" and average.documents == 48
    assert average.value.value == (first.value.value + second.value.value) / 2
    assert average.difference.value == pytest.approx(average.value.value - average.dense)
    wide, narrow = first.value.high - first.value.low, average.value.high - average.value.low
    assert narrow < wide or wide == 0  # two tasks tell more than one


@pytest.mark.slow
def test_every_task_of_the_paper_is_known_and_others_get_the_nearest_names(monkeypatch):
    known = []
    monkeypatch.setattr(harness, "_refuse_unknown", lambda name, names: known.append((name, names)))
    monkeypatch.setattr("lm_eval.tasks.TaskManager.load", lambda self, names: {"tasks": {}})
    assert [task.metric for task in find_tasks("lillama")] == 5 * ["acc_norm"] + 4 * ["acc"]
    assert [name for name, names in known if name in names] == list(harness.METRICS)
    monkeypatch.undo()
    with pytest.raises(RecipeError, match=r"no task 'arc_chalenge'; nearest: arc_challenge"):
        harness._refuse_unknown("arc_chalenge", known[0][1])
    with pytest.raises(RecipeError, match=r"no task '%%%'; `lm_eval ls tasks`"):
        harness._refuse_unknown("%%%", known[0][1])


def test_a_metric_that_is_no_mean_has_no_interval():
    answers = harness._answers(0.5, 4, [(0, 1), (1, 1), (1, 1), (1, 0)])  # F1 of gold and prediction
    assert answers.parts is None and answers.value == 0.5
    assert harness._answers(0.5, 2, [("a", "b"), ("c", "d")]).parts is None
    assert harness._answers(0.25, 4, [True, False, False, False]).kind == "mean"
    weighted = harness._answers(math.exp(3 / 4), 2, [(-1.0, 3), (-2.0, 1)])
    assert weighted.kind == "perplexity" and weighted.parts.equal(torch.tensor([[-1, 3], [-2, 1]]).double())


def test_data_that_cannot_be_fetched_is_one_line(tmp_path, monkeypatch, capfd):
    file = tmp_path / "absent.yaml"
    file.write_text(ABSENT)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match=r"absent\.yaml: cannot be used .*nobody/has-this-data.* network") as raised:
        find_tasks([str(file)])
    assert "\n" not in str(raised.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "no such task file"),
        ("task: [", "not readable as YAML"),
        ("greeting: hello", "cannot be used"),
        (CHOICE.format(name="x", data="/nowhere.jsonl"), "nowhere.jsonl"),
    ],
)
def test_bad_task_files_are_one_line(tmp_path, text, match):
    file = tmp_path / "bad.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(RecipeError, match=match) as raised:
        find_tasks([str(file)])
    assert "bad.yaml" in str(raised.value) and "\n" not in str(raised.value)


def test_a_template_that_asks_for_a_field_that_is_not_there_is_one_line(tiny, folder, tmp_path):
    file = tmp_path / "typo.yaml"
    file.write_text((folder / "first.yaml").read_text().replace("{{answer}}", "{{anwser}}"))
    with pytest.raises(RecipeError, match=r"typo\.yaml"):
        score_tasks(tiny, find_tasks([str(file)]), device="cpu")


def test_no_documents_are_refused(tiny, found):
    with pytest.raises(RecipeError, match="limit is 0"):
        score_tasks(tiny, found, limit=0)

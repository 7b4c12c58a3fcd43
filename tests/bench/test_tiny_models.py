"""What bench/tiny_models.py rests on: held-out phrases, scores, goals."""

import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("jiwer")
sys.path.append(str(Path(__file__).parents[2] / "bench"))

from tiny import goals, score, speech


def test_a_phrase_is_a_run_of_frequent_words_between_two_stops() -> None:
    text = "The cat was the dog. Was the zebra the dog?" + " the cat was dog." * 9
    found = speech.phrases(text)
    assert "the cat was" in found and "the cat was dog" in found
    assert all(len(phrase.split()) in speech.LENGTHS for phrase in found)
    assert not any("dog was" in phrase for phrase in found), "a stop lies between"


def test_no_held_out_phrase_is_heard_in_another_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech, "PARTS", {"dev": 20, "calib": 30, "train": 100})
    chance = random.Random(0)
    text = " ".join(chance.choices(["one", "two", "three", "four", "five", "six", "seven"], k=600))
    parts = {name: [utterance.text for utterance in found] for name, found in speech.planned(text, seed=0)}
    assert len(parts["dev"]) == 20 and len(parts["train"]) == 100
    assert not any(held in heard for held in parts["dev"] for heard in parts["train"] + parts["calib"])
    assert parts == {name: [one.text for one in found] for name, found in speech.planned(text, seed=0)}


def test_errors_are_words_left_out_put_in_or_mistaken() -> None:
    said = ["one two three", "one two", "one", "one two"]
    assert score.errors(["one two", "one", "one two", "two one"], said).tolist() == [1, 1, 1, 2]
    assert score.errors(said, said).sum() == 0


def test_a_model_keeps_all_of_its_own_score(tiny: Path, text: Path) -> None:
    found = score.next_tokens(tiny, tiny, text)
    assert found["retained"]["value"] == found["same"]["value"] == 1 and found["excess"]["value"] == 0


def test_share_retained_is_the_ratio_of_accuracies(make_model, tiny: Path, text: Path) -> None:
    other = make_model(seed=1)
    found = score.next_tokens(other, tiny, text)
    ids = torch.tensor(AutoTokenizer.from_pretrained(tiny)(text.read_text())["input_ids"])
    windows = ids[: len(ids) // score.SEQ_LEN * score.SEQ_LEN].view(-1, score.SEQ_LEN)
    right = []
    for folder in (other, tiny):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder)(windows).logits
        right.append((logits[:, :-1].argmax(-1) == windows[:, 1:]).double().mean().item())
    assert found["accuracy"] == pytest.approx({"model": right[0], "dense": right[1]})
    assert found["retained"]["value"] == pytest.approx(right[0] / right[1])
    assert found["same"]["value"] < 0.5


@pytest.mark.parametrize(("share", "met"), [(0.991, True), (0.989, False)])
def test_a_score_goal_is_met_from_its_bound_on(share: float, met: bool) -> None:
    row = {"model": "mamba", "recipe": "default", "keep": 0.8, "score": {"retained": {"value": share}}}
    first, *others = goals.score_goals([row], ["default"])
    assert first.met is met and all(other.met is None for other in others)


def test_a_row_that_failed_leaves_its_goal_open_and_says_why() -> None:
    row = {"model": "whisper", "recipe": "paper", "keep": 0.8, "reason": "no sound"}
    last = goals.score_goals([row], ["paper"])[-1]
    assert last.met is None and "no sound" in last.found


def test_phi_2_at_40_percent_is_refused_with_the_largest_share_that_can_go() -> None:
    assert goals.plan_goals()[-1].met

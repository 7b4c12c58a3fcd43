"""What demo/chat.py shows: the greedy answers of two chat models, side by side."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).parents[2] / "demo"))

import chat

MakeChat = Callable[..., Path]


@pytest.fixture
def make_chat(make_model: Callable[..., Path], chat_tokenizer: PreTrainedTokenizerFast) -> MakeChat:
    """Return a function that makes a tiny model with a chat template."""

    def make(seed: int) -> Path:
        folder = make_model(seed=seed)
        chat_tokenizer.save_pretrained(folder)
        return folder

    return make


def greedy(folder: Path, tokenizer: PreTrainedTokenizerFast, question: str, tokens: int) -> list[int]:
    """Return the likeliest tokens after a question, one forward pass for each."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    asked = tokenizer(f"<user>{question}")["input_ids"]
    ids = list(asked)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(asked) :]


def words(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids)).strip()


def test_an_answer_is_the_likeliest_text_after_the_template(
    make_chat: MakeChat, chat_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "NEW_TOKENS", 8)
    folder = make_chat(seed=0)
    expected = [words(chat_tokenizer, greedy(folder, chat_tokenizer, question, 8)) for question in chat.QUESTIONS]
    assert chat.answers(str(folder)) == [f"{text} ..." for text in expected]


def test_an_answer_that_ends_by_itself_is_not_marked_as_cut(
    make_chat: MakeChat, chat_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = chat.QUESTIONS[0]
    monkeypatch.setattr(chat, "QUESTIONS", (question,))
    folder = make_chat(seed=0)
    (first,) = greedy(folder, chat_tokenizer, question, 1)
    GenerationConfig(eos_token_id=first, pad_token_id=0).save_pretrained(folder)
    assert chat.answers(str(folder)) == [words(chat_tokenizer, [first])]


def test_both_answers_stand_beside_each_question(
    make_chat: MakeChat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    said = {"dense": ["Paris [bold]", "spring\nsummer", "sleep"], "small": ["Lyon", "\x1b[2Jwinter", "eat"]}
    monkeypatch.setattr(chat, "answers", said.__getitem__)
    chat.main("dense", "small")
    shown = capsys.readouterr().out
    assert "before: dense" in shown and "after: small" in shown
    lines = shown.splitlines()
    for question, before, after in (
        (chat.QUESTIONS[0], "Paris [bold]", "Lyon"),
        (chat.QUESTIONS[1], "spring", "winter"),
        (chat.QUESTIONS[2], "sleep", "eat"),
    ):
        (line,) = [line for line in lines if question in line]
        assert before in line and after in line, "what a model writes is text: no markup, and on the question's line"
    assert "\x1b[2J" not in shown


def test_all_of_an_answer_without_spaces_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(chat, "answers", lambda folder: ["9" * 100, "", ""])
    chat.main("dense", "small")
    assert capsys.readouterr().out.count("9") == 200

"""Perplexity and bits per byte against the full model and against counting."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lillama.errors import DataError, ModelError
from lillama.evaluation import tally as module
from lillama.evaluation.perplexity import TextScore, perplexity, pool_scores
from lillama.evaluation.windows import cut_windows, name_texts
from lillama.model.tokenizer import load_tokenizer


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "attention_bias": True}])
@pytest.mark.parametrize("length", [7, 64])
def test_equals_the_full_model(make_model, text, changes, length):
    folder = make_model(**changes)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    content = text.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(content)["input_ids"])
    windows = ids[: len(ids) // length * length].view(-1, length)
    with torch.no_grad():
        chances = model(windows).logits[:, :-1].double().log_softmax(-1)
    losses = -chances.gather(2, windows[:, 1:, None]).flatten()
    (score,) = perplexity(folder, [text], seq_len=length, device="cpu")
    assert score.tokens == len(losses)
    assert score.nll == pytest.approx(losses.mean().item(), rel=1e-6)
    assert score.perplexity == pytest.approx(losses.mean().exp().item(), rel=1e-6)
    bits = losses.mean().item() / math.log(2) * len(ids) / len(content.encode())
    assert score.bits_per_byte == pytest.approx(bits, rel=1e-6)


@pytest.mark.parametrize(("length", "stride"), [(32, 8), (32, 31), (32, 32), (20, 7)])
def test_overlapping_windows_equal_a_loop_over_tokens(tiny, text, length, stride, tmp_path):
    file = tmp_path / "few.txt"
    file.write_text(text.read_text(encoding="utf-8")[:700])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    ids = torch.tensor(tokenizer(file.read_text())["input_ids"])
    losses, end = [], 0
    for begin in range(0, len(ids) - length + 1, stride):
        with torch.no_grad():
            chances = model(ids[None, begin : begin + length]).logits[0].double().log_softmax(-1)
        for at in range(max(begin + 1, end), begin + length):
            losses.append(-chances[at - begin - 1, ids[at]].item())
        end = begin + length
    (score,) = perplexity(tiny, file, seq_len=length, stride=stride, device="cpu")
    assert score.tokens == len(losses)
    assert score.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)


def test_texts_pooled_are_the_texts_as_one(tiny, text, tmp_path):
    content = text.read_text(encoding="utf-8")
    parts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, part in zip(parts, (content[:3200], content[3200:6000]), strict=True):
        file.write_text(part)
    (whole,) = perplexity(tiny, text, seq_len=32, device="cpu")
    both = pool_scores("words", perplexity(tiny, parts, seq_len=32, device="cpu"))
    assert (both.name, both.tokens) == (whole.name, whole.tokens)
    assert [both.nll, both.bits_per_byte] == pytest.approx([whole.nll, whole.bits_per_byte], rel=1e-6)


def with_head(folder: Path, value: float) -> Path:
    """Fill the output layer of a model with one number."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.constant_(model.lm_head.weight, value)
    model.save_pretrained(folder)
    return folder


def test_a_model_that_knows_nothing_scores_its_vocabulary(make_model, text):
    folder = with_head(make_model(), 0.0)
    vocabulary = len(load_tokenizer(folder))
    (score,) = perplexity(folder, [text], seq_len=32)
    assert score.perplexity == pytest.approx(vocabulary, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(math.log2(vocabulary), rel=1e-5)  # one token a byte


def test_bits_count_utf8_bytes(tiny, tmp_path):
    file = tmp_path / "accents.txt"
    file.write_text("été à la forêt, où l'âne brait " * 20, encoding="utf-8")
    (score,) = perplexity(tiny, [file], seq_len=32)
    assert score.bits_per_byte == pytest.approx(score.nll / math.log(2), rel=1e-9)  # a token is a byte, not a letter


def test_windows_leave_out_the_rest_and_a_short_text_is_one(tiny):
    tokenizer = load_tokenizer(tiny)
    windows = cut_windows("a", "abcdefghij" * 3 + "xyz", tokenizer, 10)
    assert windows.ids.shape == (3, 10) and windows.ids[0].tolist() == windows.ids[2].tolist()
    assert cut_windows("a", "abc", tokenizer, 10).ids.shape == (1, 3)


def test_memory_and_batches_change_nothing(tiny, text, monkeypatch, tmp_path):
    plain = perplexity(tiny, [text], seq_len=32)
    disk = perplexity(tiny, [text], seq_len=32, activation_memory=0)
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 64)
    monkeypatch.setattr(module, "tokens_of_logits", lambda vocabulary: 1)
    slow = perplexity(tiny, [text], seq_len=32)
    assert plain == disk
    assert slow[0].nll == pytest.approx(plain[0].nll, rel=1e-6)


def test_several_texts_keep_their_order_and_names(tiny, text, tmp_path):
    other = tmp_path / "more.txt"
    other.write_text("jihgfedcba " * 50)
    twin = tmp_path / "words.txt"
    twin.write_bytes(text.read_bytes())
    scores = perplexity(tiny, [other, text, twin], seq_len=16)
    assert [score.name for score in scores] == ["more", str(text), str(twin)]
    assert scores[1].nll == scores[2].nll != scores[0].nll
    assert list(name_texts(["a/x.txt", "b/y.txt.gz"])) == ["x", "y"]


def test_progress_tells_of_every_block(tiny, text):
    told = []
    perplexity(tiny, [text], seq_len=32, report=told.append)
    assert [(p.task, p.done, p.total) for p in told] == [("perplexity", done, 3) for done in range(4)]
    assert told[-1].tokens == 3 * (6000 // 32) * 32


@pytest.mark.parametrize("seq_len", [-3, 0, 1])
def test_windows_without_a_prediction_are_refused(tiny, text, seq_len):
    with pytest.raises(DataError, match=f"seq_len is {seq_len}"):
        perplexity(tiny, [text], seq_len=seq_len)


def test_windows_beyond_the_context_are_refused(tiny, text):
    with pytest.raises(ModelError, match=r"129.*128 positions"):
        perplexity(tiny, [text], seq_len=129)


def test_logits_that_overflow_are_an_error(make_model, text):
    folder = with_head(make_model(), 3e38)
    with pytest.raises(ModelError, match=r"words.*not finite"):
        perplexity(folder, [text], seq_len=32)


def test_a_huge_loss_has_a_finite_perplexity():
    assert math.isfinite(TextScore("a", 1, 1e6, 1.0).perplexity)

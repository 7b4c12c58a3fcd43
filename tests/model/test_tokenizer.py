"""The tokenizer is loaded and asked in one place: all of each text, ids that the model knows, failures in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lillama.calibration.generate import generate
from lillama.calibration.pack import pack
from lillama.corpus.sources import Source
from lillama.errors import DataError, ModelError
from lillama.evaluation.windows import cut_windows
from lillama.model.tokenizer import (
    embeddings_of,
    encode_text,
    explain_failures,
    load_tokenizer,
    refuse_unknown_ids,
    tokenizer_hash,
)

TEXT = "A text of more than thirty-two tokens, which must neither be cut nor be filled up."


@pytest.fixture
def folder(tmp_path, model_path) -> Path:
    return shutil.copytree(model_path, tmp_path / "model")


def edit(folder: Path, name: str, **changes) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.fixture
def cutting(folder) -> Path:
    """A model folder whose tokenizer asks for texts of exactly 32 tokens, as sentence encoders and trainers save it."""
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.enable_truncation(32)
    core.enable_padding(length=32)
    core.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def larger(tokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer with one token more than the model of these tests was made for."""
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    found = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    found.add_tokens(["<|new|>"])
    return found


def test_a_text_is_neither_cut_nor_filled_up(cutting, tokenizer):
    texts = [TEXT, "short"]
    wanted = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert list(map(len, wanted)) == list(map(len, texts))
    assert encode_text(load_tokenizer(cutting), texts, None, "here", add_special_tokens=False)["input_ids"] == wanted
    asked = PreTrainedTokenizerFast(tokenizer_file=str(cutting / "tokenizer.json"))  # not by way of `load_tokenizer`
    assert encode_text(asked, texts, None, "here", add_special_tokens=False)["input_ids"] == wanted
    assert cut_windows("a", TEXT, load_tokenizer(cutting), len(TEXT)).ids.tolist() == wanted[:1]


def test_a_call_does_not_change_the_hash(cutting, tokenizer):
    asked = PreTrainedTokenizerFast(tokenizer_file=str(cutting / "tokenizer.json"), bos_token="<s>", eos_token="</s>")
    before = tokenizer_hash(asked)
    asked(TEXT, truncation=False)
    assert before == tokenizer_hash(asked) == tokenizer_hash(load_tokenizer(cutting))
    asked(TEXT, truncation=True, max_length=5)
    assert before == tokenizer_hash(asked)


def test_the_hash_of_an_ordinary_tokenizer_is_that_of_its_file(tokenizer):
    import hashlib

    assert tokenizer_hash(tokenizer) == hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def test_tokens_without_an_embedding_are_named(larger, tmp_path):
    known = len(larger) - 1
    assert encode_text(larger, ["a b"], known, "here")["input_ids"]
    named = rf"token '<\|new\|>' has the id {known}, but the model has {known} embeddings; .*resize"
    with pytest.raises(ModelError, match=f"here: {named}"):
        encode_text(larger, ["a", "b <|new|>"], known, "here")
    with pytest.raises(ModelError, match=f"novel: {named}"):
        cut_windows("novel", "b <|new|>", larger, 8, embeddings=known)
    (tmp_path / "a.txt").write_text("b <|new|> " * 50)
    sources = (Source(str(tmp_path / "a.txt")),)
    with pytest.raises(ModelError, match=rf"a\.txt: {named}"):
        pack(sources, larger, 32, 16, 0, embeddings=known)
    assert len(pack(sources, larger, 32, 16, 0, embeddings=known + 1).ids) == 2
    larger.eos_token = "<|new|>"
    with pytest.raises(ModelError, match=f"end-of-text token: {named}"):
        pack(sources, larger, 32, 16, 0, embeddings=known)


def test_a_model_writes_tokens_that_it_knows(folder, larger):
    config = LlamaConfig.from_pretrained(folder)
    config.vocab_size = 40
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    assert int(generate(folder, larger, 640, 16, seed=0).max()) < 40


def test_where_embeddings_are(model_path):
    config = LlamaConfig(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    assert embeddings_of(model) == 40
    model.resize_token_embeddings(48)
    assert embeddings_of(model) == 48
    bert = BertConfig(vocab_size=30, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    assert embeddings_of(BertForMaskedLM(bert)) == 30


def test_others_may_not_hand_a_model_unknown_tokens(model_path, larger):
    model = LlamaForCausalLM.from_pretrained(model_path)
    known = model.config.vocab_size
    with refuse_unknown_ids(model, larger, "task"), torch.no_grad():
        model(torch.tensor([[0, known - 1]]))
        with pytest.raises(ModelError, match=f"task: .* has the id {known}"):
            model(torch.tensor([[0, known]]))
    assert not model.get_input_embeddings()._forward_pre_hooks


TOKENIZERS = {
    "another model": {"model": {"type": "NEW"}},
    "another normalizer": {"normalizer": {"type": "Evil"}},
    "another decoder": {"decoder": {"type": "NEW"}},
    "no model": {"model": None},
    "vocabulary is a list": {"model": {"type": "BPE", "vocab": [], "merges": []}},
    "vocabulary is a number": {"model": {"type": "BPE", "vocab": 5, "merges": []}},
    "negative id": {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
    "id beyond 32 bits": {"model": {"type": "BPE", "vocab": {"a": 2**40}, "merges": []}},
    "added tokens are text": {"added_tokens": "x"},
}
CONFIGS = {
    "length is text": {"model_max_length": "long"},
    "length is a list": {"model_max_length": [5]},
    "token is a number": {"eos_token": 5},
    "token is an object": {"bos_token": {"content": 5}},
    "class is a list": {"tokenizer_class": ["A"]},
    "side": {"truncation_side": "up"},
    "added tokens are text": {"added_tokens_decoder": "x"},
    "template without a name": {"chat_template": [{"template": "x"}]},
    "code": {"auto_map": {"AutoTokenizer": ["code.T", None]}, "tokenizer_class": "T"},
}


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_tokenizers_of_another_format(folder, damage):
    edit(folder, "tokenizer.json", **TOKENIZERS[damage])
    refused(folder)


@pytest.mark.parametrize("damage", CONFIGS)
def test_settings_of_a_wrong_type(folder, damage):
    edit(folder, "tokenizer_config.json", **CONFIGS[damage])
    refused(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"5", b"[]", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_that_are_damaged(folder, name, content):
    if (name, content) == ("tokenizer_config.json", b"[]"):
        pytest.skip("empty settings are settings")
    (folder / name).write_bytes(content)
    refused(folder)


def test_code_that_is_not_run_is_named_with_its_remedy(folder):
    edit(folder, "tokenizer_config.json", **CONFIGS["code"])
    with pytest.raises(
        ModelError, match=r"no usable tokenizer .*custom code.*; read that code, and .* --trust-remote-code"
    ):
        load_tokenizer(folder)


def refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="no usable tokenizer") as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_tokenizer_cannot_say_is_told_with_its_place():
    core = Tokenizer.from_str(json.dumps({
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "decoder": None,
        "post_processor": None, "truncation": None, "padding": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"},
    }))  # fmt: skip
    asked = PreTrainedTokenizerFast(tokenizer_object=core)
    assert encode_text(asked, ["a a"], None, "here")["input_ids"] == [[0, 0]]
    with pytest.raises(DataError, match=r"here: the tokenizer fails on this text .*tokenizer\.json"):
        encode_text(asked, ["b"], None, "here")


def test_halves_of_surrogate_pairs_are_no_text(tokenizer):
    with pytest.raises(DataError, match=r"here: character 3 is \\ud83d, half of a surrogate pair") as caught:
        encode_text(tokenizer, ["ab\ud83d"], None, "here")
    str(caught.value).encode()


def test_only_failures_of_others_are_explained():
    class PanicException(BaseException):
        """Named as the one that Rust code raises."""

    for error, wanted in (
        (KeyError("name"), "KeyError: 'name'"),
        (Exception("a\nb"), "a"),
        (RecursionError(), "RecursionError"),
        (PanicException("index out of bounds"), "index out of bounds"),
    ):
        with pytest.raises(DataError) as caught, explain_failures(DataError):
            raise error
        assert str(caught.value) == wanted
    for error in (KeyboardInterrupt(), SystemExit(3), MemoryError(), ModelError("a")):
        with pytest.raises(type(error)) as kept, explain_failures(DataError):
            raise error
        assert kept.value is error

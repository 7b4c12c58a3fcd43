from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from lillama.calibration.generate import generate
from lillama.calibration.sample import CalibrationConfig, parse_sources, sample_calibration
from lillama.corpus.sources import Source
from lillama.errors import DataError, ModelError
from lillama.model.tokenizer import load_tokenizer


def test_no_source_means_the_model_itself(model_path, tokenizer):
    blocks = sample_calibration(CalibrationConfig(tokens=70, seq_len=16), model_path, tokenizer, seed=3)
    assert torch.equal(blocks.ids, generate(model_path, tokenizer, 70, 16, seed=3))
    assert blocks.manifest.kind == "self" and blocks.manifest.sources == ()
    assert (blocks.manifest.temperature, blocks.manifest.seed, blocks.manifest.wanted) == (1.0, 3, 70)


def test_sources_mean_text(tmp_path, model_path, tokenizer):
    (tmp_path / "a.txt").write_text("abcdefghij" * 100)
    config = CalibrationConfig(sources=(Source(str(tmp_path / "a.txt")),), tokens=64, seq_len=16)
    blocks = sample_calibration(config, model_path, tokenizer, seed=0)
    assert blocks.manifest.kind == "text" and blocks.ids.shape == (4, 16)
    assert blocks.manifest.sources[0].path == str(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"tokens": -5}, "tokens is -5"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"seq_len": -1}, "seq_len is -1"),
        ({"tokens": 100, "seq_len": 101}, "tokens is 100, less than one sequence"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"sources": (Source("a.txt"), Source("b.txt", weight=-2.0))}, "b.txt: weight is -2.0"),
    ],
)
def test_senseless_numbers_are_refused(tmp_path, tokenizer, fields, words):
    with pytest.raises(DataError, match=words) as caught:
        sample_calibration(replace(CalibrationConfig(), **fields), tmp_path, tokenizer, seed=0)
    assert "\n" not in str(caught.value)


def test_load_tokenizer(tmp_path, model_path, tokenizer):
    assert load_tokenizer(model_path).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ModelError, match="no usable tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_parse_sources():
    assert parse_sources([]) == parse_sources(["self"]) == ()
    assert parse_sources(["a.txt", "owner/data"]) == (Source("a.txt"), Source("owner/data"))
    with pytest.raises(DataError, match="'self' stands beside 1 other"):
        parse_sources(["self", "a.txt"])


@pytest.mark.assets
def test_real_texts_become_two_languages_in_equal_parts(assets):
    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "eltec-llama-8m")
    sources = tuple(Source(str(assets / "text" / f"{language}.calib.txt")) for language in ("eng", "fra"))
    blocks = sample_calibration(CalibrationConfig(sources=sources, tokens=16384), assets, tokenizer, seed=0)
    assert blocks.ids.shape == (64, 256)
    assert [record.tokens for record in blocks.manifest.sources] == [8192, 8192]
    assert " the " in tokenizer.decode(blocks.ids.flatten()) and " était " in tokenizer.decode(blocks.ids.flatten())


@pytest.mark.assets
def test_a_real_chat_template(assets, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(assets / "tokenizers" / "lucie-instruct")
    (tmp_path / "a.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Bonjour"}, {"role": "assistant", "content": "Salut !"}]}\n' * 3
    )
    blocks = sample_calibration(
        CalibrationConfig(sources=(Source(str(tmp_path / "a.jsonl")),), tokens=30, seq_len=30), assets, tokenizer, 0
    )
    text = tokenizer.decode(blocks.ids[0])
    assert "<|start_header_id|> user" in text and "Bonjour" in text
    assert "<|eot_id|><|eot_id|>" not in text and "</s><s>" not in text.replace(" ", "")

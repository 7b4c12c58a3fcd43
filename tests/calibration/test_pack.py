import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lillama.calibration.pack import CalibrationSet, Manifest, pack, share
from lillama.corpus.sources import Source
from lillama.errors import DamagedError, DataError
from lillama.files.artefacts import save_tensors
from lillama.model.tokenizer import tokenizer_hash
from lillama.system.progress import Progress

EOS = 1


def write(folder: Path, name: str, text: str) -> Source:
    (folder / name).write_text(text)
    return Source(str(folder / name))


def jsonl(folder: Path, name: str, texts: list[str]) -> Source:
    return write(folder, name, "\n".join(json.dumps({"text": text}) for text in texts))


@given(
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6),
    sequences=st.integers(1, 10_000),
)
def test_shares_sum_to_the_budget_and_follow_the_weights(weights, sequences):
    sources = tuple(Source(str(i), weight=weight) for i, weight in enumerate(weights))
    try:
        counts = share(sources, sequences)
    except DataError as error:
        assert "none of the" in str(error)
        return
    assert sum(counts) == sequences
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - sequences * weight / sum(weights)) < 1


@pytest.mark.parametrize("tokens", [40, 41, 49, 200])
def test_budget_is_kept_to_the_sequence(tmp_path, tokenizer, tokens):
    source = write(tmp_path, "a.txt", "abcdefghij" * 200)
    blocks = pack((source,), tokenizer, tokens, 10, seed=0)
    assert blocks.ids.shape == (tokens // 10, 10)
    assert blocks.mask is None
    assert blocks.tokens == blocks.manifest.tokens == tokens // 10 * 10 <= tokens == blocks.manifest.wanted


def test_same_seed_same_tokens_other_seed_other_tokens(tmp_path, tokenizer):
    source = write(tmp_path, "a.txt", " ".join(map(str, range(2000))))
    first, again, other = (pack((source,), tokenizer, 320, 16, seed) for seed in (3, 3, 4))
    assert torch.equal(first.ids, again.ids) and first.manifest == again.manifest
    assert not torch.equal(first.ids, other.ids) and first.manifest.hash != other.manifest.hash


def test_windows_are_chosen_among_four_times_the_need_without_repetition(tmp_path, tokenizer):
    text = "".join(f"{i:04d}" for i in range(1000))
    blocks = pack((write(tmp_path, "a.txt", text),), tokenizer, 80, 4, seed=0)
    numbers = [int(word) for word in tokenizer.batch_decode(blocks.ids)]
    assert len(set(numbers)) == 20 and max(numbers) < 80 and sorted(numbers) != numbers
    assert set(numbers) != set(range(20))


def test_weights_are_respected_and_no_sequence_crosses_sources(tmp_path, tokenizer):
    a, b = (write(tmp_path, f"{letter}.txt", letter * 5000) for letter in "ab")
    blocks = pack((a, replace(b, weight=3.0)), tokenizer, 400, 10, seed=0)
    words = tokenizer.batch_decode(blocks.ids)
    assert sorted(words) == ["a" * 10] * 10 + ["b" * 10] * 30
    assert words != sorted(words)
    assert [record.tokens for record in blocks.manifest.sources] == [100, 300]


def test_end_of_text_stands_between_documents_only(tmp_path, tokenizer):
    blocks = pack((jsonl(tmp_path, "a.jsonl", ["aa", "bbb", "c", "dd"]),), tokenizer, 11, 11, seed=0)
    assert tokenizer.decode(blocks.ids[0]) == "aa</s>bbb</s>c</s>dd"
    assert blocks.manifest.sources[0].documents == 4
    plain = pack((write(tmp_path, "a.txt", "one\n\ntwo\n\n" * 40_000),), tokenizer, 300_000, 100, seed=0)
    assert EOS not in plain.ids
    assert plain.manifest.sources[0].documents == 1


def test_plain_files_of_a_folder_are_separate_documents(tmp_path, tokenizer):
    folder = tmp_path / "books"
    folder.mkdir()
    write(folder, "1.txt", "aa"), write(folder, "2.txt", "bb")
    assert tokenizer.decode(pack((Source(str(folder)),), tokenizer, 5, 5, seed=0).ids[0]) == "aa</s>bb"


def test_a_separator_that_the_text_brings_is_not_doubled(tmp_path, tokenizer):
    source = jsonl(tmp_path, "a.jsonl", ["aa</s>", "bb"])
    assert tokenizer.decode(pack((source,), tokenizer, 5, 5, seed=0).ids[0]) == "aa</s>bb"


def test_a_tokenizer_without_end_of_text_joins_directly(tmp_path, tokenizer):
    bare = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    assert bare.decode(pack((jsonl(tmp_path, "a.jsonl", ["aa", "bb"]),), bare, 4, 4, seed=0).ids[0]) == "aabb"


def test_chat_templates_reach_the_tokens(tmp_path, chat_tokenizer):
    source = write(tmp_path, "a.jsonl", json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))
    assert chat_tokenizer.decode(pack((source,), chat_tokenizer, 8, 8, seed=0).ids[0]) == "<user>Hi"


def test_a_short_source_gives_all_it_has_and_a_warning(tmp_path, tokenizer, caplog):
    a, b = write(tmp_path, "a.txt", "a" * 57), write(tmp_path, "b.txt", "b" * 900)
    with caplog.at_level(logging.WARNING):
        blocks = pack((a, b), tokenizer, 400, 10, seed=0)
    assert [record.tokens for record in blocks.manifest.sources] == [50, 200]
    assert [record.getMessage() for record in caplog.records] == [
        f"{a.path}: holds 50 tokens of the 200 wanted; all are taken"
    ]


def test_less_than_one_sequence_is_an_error(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"a\.txt: holds less than one sequence of 10 tokens"):
        pack((write(tmp_path, "a.txt", "abc"),), tokenizer, 100, 10, seed=0)


def test_a_weight_without_a_sequence_is_an_error(tmp_path, tokenizer):
    a, b = (write(tmp_path, f"{letter}.txt", letter * 500) for letter in "ab")
    with pytest.raises(DataError, match=r"b\.txt: its weight 0\.001 of 1\.001 gives it none of the 10"):
        pack((a, replace(b, weight=0.001)), tokenizer, 100, 10, seed=0)


def test_manifest_changes_with_one_byte_even_outside_the_tokens_taken(tmp_path, tokenizer):
    text = "abcdefghij" * 100
    first = pack((write(tmp_path, "a.txt", text),), tokenizer, 20, 10, seed=0)
    other = pack((write(tmp_path, "a.txt", text[:-1] + "k"),), tokenizer, 20, 10, seed=0)
    assert torch.equal(first.ids, other.ids)
    assert first.manifest.sha256 == other.manifest.sha256
    assert first.manifest.hash != other.manifest.hash


def test_tokenizer_hash_tells_tokenizers_apart(tokenizer):
    other = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    assert tokenizer_hash(tokenizer) == tokenizer_hash(other)
    other.add_tokens(["<new>"])
    assert tokenizer_hash(tokenizer) != tokenizer_hash(other)


@pytest.mark.parametrize("masked", [False, True])
def test_save_and_load_round_trip(tmp_path, tokenizer, masked):
    blocks = pack((write(tmp_path, "a.txt", "abcdefghij" * 100),), tokenizer, 100, 10, seed=0)
    if masked:
        mask = torch.ones_like(blocks.ids, dtype=torch.bool)
        mask[0, 7:] = False
        blocks = replace(blocks, mask=mask)
        assert blocks.tokens == 97
    blocks.save(tmp_path / "run" / "calibration")
    loaded = CalibrationSet.load(tmp_path / "run" / "calibration")
    assert torch.equal(loaded.ids, blocks.ids) and loaded.manifest == blocks.manifest
    assert (loaded.mask is None) == (blocks.mask is None) and loaded.tokens == blocks.tokens
    assert Manifest.from_json(json.loads(json.dumps(blocks.manifest.to_json()))) == blocks.manifest


@pytest.mark.parametrize("damage", ["none", "ids", "version", "manifest", "half"])
def test_damaged_folders_are_refused_in_one_line(tmp_path, tokenizer, damage):
    folder = tmp_path / "calibration"
    blocks = pack((write(tmp_path, "a.txt", "abcdefghij" * 100),), tokenizer, 100, 10, seed=0)
    if damage != "none":
        blocks.save(folder)
    if damage == "version":
        manifest = folder / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 2'))
    if damage == "ids":
        save_tensors(folder / "tokens.safetensors", {"ids": blocks.ids + 1})
    if damage == "manifest":
        (folder / "manifest.json").write_text("{}")
    if damage == "half":
        (folder / "tokens.safetensors").write_bytes((folder / "tokens.safetensors").read_bytes()[:50])
    with pytest.raises(DamagedError) as caught:
        CalibrationSet.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_progress_is_told(tmp_path, tokenizer):
    told: list[Progress] = []
    pack((write(tmp_path, "a.txt", "a" * 100),), tokenizer, 50, 10, seed=0, report=told.append)
    assert {progress.task for progress in told} == {"calibration"}
    assert (told[0].done, told[-1].done, told[-1].total, told[-1].tokens) == (0, 1, 1, 50)

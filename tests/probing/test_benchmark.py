"""Benchmarks as files: what comes with lillama is sound, what a user writes is checked."""

from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml

from lillama.errors import ProbeError
from lillama.probing.benchmark import Benchmark, benchmark_names, built_in_sets, load_benchmark
from lillama.probing.pairs import read_pairs


def test_all_that_comes_with_lillama_is_there():
    wanted = {"babyslm-lexical", "babyslm-syntactic", "blimp", "zorro"}
    assert wanted <= set(benchmark_names()) and not wanted & set(built_in_sets())


@pytest.mark.parametrize("name", benchmark_names())
def test_benchmarks_survive_yaml(name, tmp_path):
    benchmark = load_benchmark(name)
    assert benchmark.name == name and benchmark.title and benchmark.source
    (tmp_path / "again.yaml").write_text(benchmark.as_yaml(), encoding="utf-8")
    assert load_benchmark(tmp_path / "again.yaml") == benchmark


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"god": "x"}, "unknown key god; did you mean 'good'?"),
        ({"groups": {"type": {"colum": "x"}}}, "unknown key groups.type.colum; did you mean 'column'?"),
        ({"good": None}, "good is None: it must be a valid string"),
        ({"average": []}, "average is .*: Tuple should have at least 1 item"),
        ({"unit": "syllable"}, "unit is 'syllable': it must be 'token', 'char', 'word' or 'phoneme'"),
        ({"template": "a"}, "template is 'a': it must hold {}"),
        ({"file_name": "("}, r"file_name is '\(': missing \)"),
        ({"groups": {"type": {"bands": [1, 2], "labels": ["x"]}}}, "groups.type has 2 bands and 1 labels"),
        ({"groups": {"type": {"bands": [2, 1], "labels": ["x", "y"]}}}, "groups.type.bands is .*: it must ascend"),
    ],
)
def test_bad_benchmarks(farm, changes, match):
    farm.write_text(yaml.safe_dump(yaml.safe_load(farm.read_text()) | changes), encoding="utf-8")
    with pytest.raises(ProbeError, match=match):
        load_benchmark(farm)


@pytest.mark.parametrize("key", ["name", "files", "good", "bad", "pair", "average", "groups"])
def test_missing_keys(farm, key):
    tree = yaml.safe_load(farm.read_text())
    del tree[key]
    farm.write_text(yaml.safe_dump(tree), encoding="utf-8")
    with pytest.raises(ProbeError, match=f"key {key} is missing"):
        load_benchmark(farm)


@pytest.mark.parametrize(
    ("content", "match"), [("a: [", "not readable as YAML"), ("- a", "a mapping of keys to values, found list")]
)
def test_no_benchmarks(farm, content, match):
    farm.write_text(content, encoding="utf-8")
    with pytest.raises(ProbeError, match=match):
        load_benchmark(farm)


def test_unknown_names_get_the_nearest():
    with pytest.raises(ProbeError, match=r"benchmark babyslm-syntatic: neither .*; did you mean 'babyslm-syntactic'"):
        load_benchmark("babyslm-syntatic")


def test_blimp_is_read_from_json_lines(tmp_path):
    rows = "".join(
        f'{{"sentence_good": "good {i}", "sentence_bad": "bad {i}", "UID": "u", "linguistics_term": "p", "field": "f", '
        f'"pairID": {i}, "one_prefix_method": true}}\n'
        for i in range(3)
    )
    (tmp_path / "u.jsonl").write_text(rows, encoding="utf-8")
    pairs = read_pairs(load_benchmark("blimp"), tmp_path)
    assert [(pair.good, pair.bad, pair.fields["pairID"]) for pair in pairs] == [
        (f"good {i}", f"bad {i}", f"{i}") for i in range(3)
    ]
    for content, match in (("{", "line 1: not readable as JSON"), ("[]", "line 1: an object is needed, found list")):
        (tmp_path / "u.jsonl").write_text(content, encoding="utf-8")
        with pytest.raises(ProbeError, match=match):
            read_pairs(load_benchmark("blimp"), tmp_path)


def test_zorro_is_read_from_lines_and_file_names(tmp_path):
    (tmp_path / "island-effects-adjunct_island.txt").write_text("wrong one .\nright one .\n", encoding="utf-8")
    (tmp_path / "case-subjective_pronoun.txt").write_text("wrong two .\nright two .\n", encoding="utf-8")
    pairs = read_pairs(load_benchmark("zorro"), tmp_path)
    assert [(pair.good, pair.bad, pair.fields["phenomenon"], pair.fields["id"]) for pair in pairs] == [
        ("right two .", "wrong two .", "case", "1"),
        ("right one .", "wrong one .", "island-effects", "1"),
    ]
    for content, match in (("a\n", "1 lines; two lines make a pair"), ("a\n\n", "line 2 is empty"), ("", "0 lines")):
        (tmp_path / "case-subjective_pronoun.txt").write_text(content, encoding="utf-8")
        with pytest.raises(ProbeError, match=match):
            read_pairs(load_benchmark("zorro"), tmp_path)
    (tmp_path / "case-subjective_pronoun.txt").rename(tmp_path / "README.txt")
    with pytest.raises(ProbeError, match=r"README.txt: the name does not match"):
        read_pairs(load_benchmark("zorro"), tmp_path)


def test_a_model_of_text_is_asked_about_the_first_voice(write_table):
    rows = [
        {"filename": f"{voice}{correct}", "id": 1, "voice": voice, "type": "t", "subtype": "s", "transcription": text,
         "correct": correct}
        for voice in "AB" for text, correct in (("bad", 0), ("good", 1))
    ]  # fmt: skip
    (pair,) = read_pairs(load_benchmark("babyslm-syntactic"), write_table("gold.csv", rows).parent)
    assert (pair.good, pair.bad, pair.fields["voice"], pair.fields["type"]) == ("good", "bad", "A", "t")
    assert pair.fields["sentence"] == "good" and "filename" not in pair.fields


def test_bad_data(farm, write_table, tmp_path):
    rules = load_benchmark(farm)
    with pytest.raises(ProbeError, match=r"no such folder; give the one that holds farm.csv as --data"):
        read_pairs(rules, tmp_path / "none")
    row = {"id": 1, "type": "t", "sentence": "a", "non sentence": "b"}
    bad = [
        ([row, row | {"sentence": "c"}], "type, id = t, 1 names two pairs: 'a' and 'c'"),
        ([row | {"non sentence": " "}], "line 2: 'non sentence' is empty"),
        (
            [{"id": 1, "type": "t", "sentenc": "a", "non sentence": "b"}],
            "column 'sentence' is missing; .*; did you mean 'sentenc'",
        ),
    ]
    for rows, match in bad:
        write_table("farm.csv", rows)
        with pytest.raises(ProbeError, match=match):
            read_pairs(rules, tmp_path)
    (tmp_path / "farm.csv").unlink()
    with pytest.raises(ProbeError, match=r"no file farm.csv here, which farm is made of"):
        read_pairs(rules, tmp_path)


def test_the_example_of_the_docs_is_a_benchmark(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "probe.md").read_text(encoding="utf-8")
    (tmp_path / "farm.yaml").write_text(page.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    assert load_benchmark(tmp_path / "farm.yaml").name == "farm"
    keys = {key for line in page.splitlines() if line.startswith("| `") for key in line.split("|")[1].split("`")[1::2]}
    assert {part.name for part in fields(Benchmark) if part.default is not MISSING} <= keys

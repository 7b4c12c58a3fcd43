"""Cells of tables: what is no text is not scored as one."""

import json

import pytest

from lillama.errors import ProbeError
from lillama.probing.average import breakdown
from lillama.probing.benchmark import Grouping, load_benchmark
from lillama.probing.judge import judge
from lillama.probing.pairs import read_pairs
from lillama.probing.table import read_table

ROW = {"sentence_good": "a b", "sentence_bad": "a c", "field": "f", "linguistics_term": "t", "UID": "u", "pairID": 3}


def blimp(folder, *rows, suffix=".jsonl"):
    lines = [json.dumps(row) for row in rows]
    (folder / f"a{suffix}").write_text("\n".join(lines) + "\n")
    return read_pairs(load_benchmark("blimp"), folder)


def test_names_may_be_numbers_and_what_is_not_asked_for_may_be_anything(tmp_path):
    (pair,) = blimp(tmp_path, ROW | {"simple": True, "tokens": ["a", {"b": None}], "none": None, "share": float("nan")})
    assert (pair.good, pair.bad, pair.fields["pairID"], pair.fields["none"]) == ("a b", "a c", "3", "")


@pytest.mark.parametrize("column", ["sentence_good", "sentence_bad"])
@pytest.mark.parametrize(
    ("cell", "match"),
    [
        (None, "is empty"),
        ("", "is empty"),
        (" \t", "is empty"),
        (float("nan"), "is NaN; it must be a text"),
        (5, "is 5; it must be a text"),
        (True, "is true; it must be a text"),
        (["a b"], r'is \["a b"\]; it must be a text'),
        ({"text": "a"}, r'is \{"text": "a"\}; it must be a text'),
        (["a" * 1000], r'is \["a{58}; it must be a text'),
    ],
)
def test_texts_are_texts(tmp_path, column, cell, match):
    with pytest.raises(ProbeError, match=rf"a\.jsonl, line 2: '{column}' {match}") as caught:
        blimp(tmp_path, ROW, ROW | {column: cell})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("column", ["UID", "pairID", "field"])
def test_names_are_not_null(tmp_path, column):
    with pytest.raises(ProbeError, match=f"line 1: '{column}' is empty"):
        blimp(tmp_path, ROW | {column: None})


def test_halves_of_surrogate_pairs_are_refused(tmp_path):
    for changes in ({"sentence_bad": "a \ud83d"}, {"field": "\udc00"}, {"\udc00": "x"}):
        with pytest.raises(ProbeError, match=r"a\.jsonl, line 1: character \d+ is \\ud"):
            blimp(tmp_path, ROW | changes)


def test_deep_json_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"sentence_good": ' + "[" * 100_000)
    with pytest.raises(ProbeError, match="line 1: not readable as JSON"):
        read_pairs(load_benchmark("blimp"), tmp_path)


def test_separators_of_unicode_do_not_end_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROW | {"sentence_good": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    (pair,) = read_pairs(load_benchmark("blimp"), tmp_path)
    assert pair.good == "a\u2028b\x85c"
    (tmp_path / "a.csv").write_text("a,b\n1\u20282,3\n", encoding="utf-8")
    assert read_table(tmp_path / "a.csv", ("a", "b"), ()).rows == ({"a": "1\u20282", "b": "3"},)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('a,b\n"' + "x" * 200_000, r"a\.csv, line \d+: field larger than field limit .*quote"),
        ("a,b\n1\n", "line 2: 1 cells, but the header has 2"),
        ("a,a\n", "two columns are named 'a'"),
        ("", "no rows"),
    ],
)
def test_tables_that_are_none(tmp_path, content, match):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ProbeError, match=match):
        read_table(tmp_path / "a.csv", ("a", "b"), ())


@pytest.mark.parametrize("names", ["trials", "probabilities"])
def test_files_that_cannot_be_read_are_told(tmp_path, names):
    path = tmp_path / "file"
    given = {"trials": None, "probabilities": path, "gold": tmp_path} | ({"trials": path} if names == "trials" else {})
    for match in ("no such file", "is a folder", "not UTF-8 at byte 1"):
        with pytest.raises(ProbeError, match=match):
            judge(benchmark="babyslm-lexical", **given | ({} if names == "trials" else {"gold": path}))
        if match == "no such file":
            path.mkdir()
        elif match == "is a folder":
            path.rmdir()
            path.write_bytes(b"a\xff")


@pytest.mark.parametrize("value", ["nan", "inf", "many", ""])
def test_bands_are_of_finite_numbers(value):
    from lillama.probing.average import Item

    grouping = Grouping("length", (0.0, 5.0), ("short", "long"))
    with pytest.raises(ProbeError, match=f"column 'length' holds '{value}'"):
        breakdown("length", grouping, [Item({"length": value}, 1.0)], None, 0)
    found = breakdown(
        "length", Grouping("length"), [Item({"length": "9" * 5000}, 1.0), Item({"length": "7"}, 1.0)], None, 0
    )
    assert [group.items for group in found] == [1, 1]


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("files", "['/etc/*']", "files holds '/etc/\\*'; globs of files below"),
        ("files", "['../*.csv']", "files holds"),
        ("files", "['']", "files holds"),
        ("files", "['**.csv']", "files holds"),
        ("file_name", "'a{99999999999}'", "file_name is 'a.99999999999.'"),
        ("file_name", "'('", "file_name is"),
        ("groups", "{g: {bands: [.nan], labels: [a]}}", "bands.*finite"),
        ("title", "!!int abc", "'abc' is no int"),
        ("title", "[" * 60, "nested more than"),
        ("title", "[" + ", ".join(["x"] * 5000) + "]", r"title is \['x', .*: it must be"),
    ],
)
def test_benchmarks_of_odd_values(tmp_path, key, value, match):
    rules = load_benchmark("blimp").as_yaml()
    kept = [line for line in rules.splitlines() if not line.startswith(f"{key}:")]
    if key in ("files", "groups"):
        tree = [line for line in rules.split("\n") if line]
        kept, skip = [], False
        for line in tree:
            skip = line.startswith(f"{key}:") or (skip and line.startswith((" ", "-")))
            kept += [] if skip else [line]
    (tmp_path / "b.yaml").write_text("\n".join([*kept, f"{key}: {value}"]), encoding="utf-8")
    with pytest.raises(ProbeError, match=match) as caught:
        load_benchmark(tmp_path / "b.yaml")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500

"""`lillama probe make`: what it writes can be probed, is as it was, and what is wrong is said in a line."""

import csv
import json

import pytest

from lillama.cli.app import main
from lillama.errors import OutputError, ProbeError
from lillama.probing.benchmark import load_benchmark, packaged_data
from lillama.probing.pairs import read_pairs
from lillama.probing.stimuli import make
from lillama.probing.stimuli.make import make_stimuli, write_table
from lillama.probing.stimuli.sets import syntactic_set
from lillama.probing.stimuli.vocabulary import read_word_list


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    return exit_.value.code


def test_what_comes_with_lillama_is_what_make_makes(language, words, tmp_path):
    for stimuli in (words, syntactic_set(language, None, "", 1200, 0)):
        write_table(tmp_path / "set.csv", stimuli)
        assert (tmp_path / "set.csv").read_bytes() == (packaged_data() / f"{stimuli.name}.csv").read_bytes()
        assert all(abs(value - 0.5) <= 0.02 for models in stimuli.control.values() for value in models.values())


def test_make_writes_what_probe_reads(tmp_path, capsys):
    assert run("probe", "make", tmp_path / "out", "--language", "en", "--pairs", "24", "--seed", "3", "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["version"] == 1 and [found["name"] for found in value["sets"]] == ["lexical-en", "syntactic-en"]
    for found in value["sets"]:
        benchmark = load_benchmark(tmp_path / "out" / f"{found['name']}.yaml")
        assert benchmark.source == found["source"] and "--seed 3" in found["source"]
        assert len(read_pairs(benchmark, tmp_path / "out")) == found["pairs"] == 24
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "| lexical-en | 24 |" in readme and "| noun_verb_order | 50.0 % | 50.0 % |" in readme


def test_make_prints_the_control_and_the_command(tmp_path, capsys):
    assert run("probe", "make", tmp_path / "out", "--language", "fr", "--pairs", "12", "--task", "syntactic") == 0
    printed = capsys.readouterr().out
    assert "determiner_noun_agreement" in printed and "50.0" in printed
    assert printed.splitlines()[-1] == f"lillama probe MODEL --benchmark {tmp_path / 'out' / 'syntactic-fr'}.yaml"
    assert not (tmp_path / "out" / "lexical-fr.csv").exists()


def test_texts_are_counted_and_train_a_control_of_their_own(tmp_path):
    text = tmp_path / "tale.txt"
    text.write_text(
        "The cat and the dog saw a cow. The cats and dogs saw cows. A hat, a bat and a rat met the fat cat. " * 3
    )
    made = make_stimuli(tmp_path / "out", "en", texts=[text], tasks=["syntactic"], pairs=120)
    models = made[0].control["noun_verb_agreement"]
    assert models == dict.fromkeys(("unigram of set", "bigram of set", "unigram of text", "bigram of text"), 0.5)
    assert "men" in made[0].whole and "animals" not in made[0].whole
    assert "used whole: " in (tmp_path / "out" / "README.md").read_text()


def test_phonemes_match_too(tmp_path):
    pytest.importorskip("gruut")
    (made,) = make_stimuli(tmp_path / "out", "en", tasks=["lexical"], pairs=40, phonemes="gruut")
    for row in made.rows:
        ours, theirs = str(row["phonemes"]).split(), str(row["non phonemes"]).split()
        assert len(ours) == len(theirs) == row["length"]
        assert 1 <= sum(a != b for a, b in zip(ours, theirs, strict=True)) <= 2
    assert set(made.control) == {"letters", "phonemes"}
    benchmark = load_benchmark(tmp_path / "out" / "lexical-en-phonemes.yaml")
    pairs = read_pairs(benchmark, tmp_path / "out")
    assert [pair.good for pair in pairs] == [row["phonemes"] for row in made.rows]


@pytest.mark.parametrize(
    "text", ["rabbit,12\nhen,3\n", "word\tcount\nrabbit\t12\nhen\t3\n", "mot;n\nRabbit;10\nrabbit;2\n\nhen;3"]
)
def test_word_lists_with_any_separator_and_header(text, tmp_path):
    file = tmp_path / "words.csv"
    file.write_text(text)
    assert read_word_list(file).counts == {"rabbit": 12, "hen": 3}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("rabbit,12\nlittle,five\n", "words.csv: line 2 is 'little,five'; a line holds a word and its count"),
        ("rabbit,12\nlittle\n", "words.csv: line 2 is 'little'; a line"),
        ("rabbit,12\n,3\n", "words.csv: line 2 is ',3'; a line"),
        (f"rabbit,12\nlittle,{'9' * 400}\n", "words.csv: line 2 is 'little,999"),
        (f"rabbit,12\n{'x' * 140_000},3\n", "words.csv: line 2: field larger than field limit"),
        ("", "words.csv: holds no words"),
        ("word,count\n", "words.csv: holds no words"),
    ],
)
def test_bad_lines(text, error, tmp_path, capsys):
    (tmp_path / "words.csv").write_text(text)
    assert run("probe", "make", tmp_path / "out", "--language", "en", "--vocabulary", tmp_path / "words.csv") == 2
    printed = capsys.readouterr().err
    assert error in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_list_that_is_no_text(tmp_path):
    (tmp_path / "words.csv").write_bytes(b"caf\xe9,3\n")
    with pytest.raises(ProbeError, match=r"words\.csv: not UTF-8 at byte 3"):
        read_word_list(tmp_path / "words.csv")


def test_options_that_make_no_sense(tmp_path):
    with pytest.raises(ProbeError, match="language de: choose one of en, fr"):
        make_stimuli(tmp_path / "out", "de")
    with pytest.raises(ProbeError, match="--pairs is 0"):
        make_stimuli(tmp_path / "out", "en", pairs=0)
    with pytest.raises(ProbeError, match="--vocabulary and --text are two sources"):
        make_stimuli(tmp_path / "out", "en", vocabulary="a", texts=["b"])
    with pytest.raises(OutputError, match="exists already; remove it or name another folder"):
        make_stimuli(tmp_path, "en")


def test_tables_are_plain_csv():
    for name in ("lexical-en", "lexical-fr", "syntactic-en", "syntactic-fr"):
        with (packaged_data() / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["id"] for row in rows] == [str(number) for number in range(1, 1201)]
        assert all(cell for row in rows for cell in row.values())


@pytest.mark.parametrize("kind", ["folder", "file", "link to nothing"])
def test_what_comes_while_the_work_goes_on_stays(tmp_path, monkeypatch, kind):
    out, described = tmp_path / "out", make.benchmarks

    def late(stimuli):
        if kind == "folder":
            out.mkdir(exist_ok=True)
            (out / "mine").touch()
        elif kind == "file":
            out.touch()
        elif not out.is_symlink():
            out.symlink_to("nowhere")
        return described(stimuli)

    monkeypatch.setattr(make, "benchmarks", late)
    with pytest.raises(OutputError, match="exists already"):
        make_stimuli(out, "en", pairs=4, tasks=("syntactic",))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not out.is_dir() or (out / "mine").is_file()

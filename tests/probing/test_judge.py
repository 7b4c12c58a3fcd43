"""What other systems wrote becomes the figures that the benchmarks' own scripts give."""

import csv
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas
import pytest

from lillama.errors import ProbeError
from lillama.probing.judge import judge

LEXICAL = "babyslm-lexical"
SYNTACTIC = "babyslm-syntactic"
SENTENCES = ("id", "voice", "type", "subtype", "sentence", "score sentence", "non sentence", "score non sentence")


def sentences(count: int, voices: Sequence[str], seed: int = 0) -> list[dict[str, object]]:
    """Return trials of the syntactic task with ties among them."""
    chance = random.Random(seed)
    return [
        dict(zip(SENTENCES, (i, v, f"type{i % 3}", f"sub{i % 6}", f"good {i}", -chance.randint(1, 4), f"bad {i}",
                             -chance.randint(1, 4)), strict=True))
        for i in range(count) for v in voices
    ]  # fmt: skip


def words(count: int, voices: Sequence[str], seed: int = 0) -> list[dict[str, object]]:
    """Return trials of the lexical task: each word has a number of pseudo-words of its own."""
    chance = random.Random(seed)
    rows = [
        {"id": 100 * word + other, "voice": voice, "frequency": word % 130, "word": f"w{word}", "length": 2 + word % 5,
         "score word": chance.randint(-4, -1), "non word": f"x{word}.{other}", "score non word": chance.randint(-4, -1)}
        for word in range(count) for other in range(1 + word % 7) for voice in voices
    ]  # fmt: skip
    chance.shuffle(rows)
    return rows


def official_lexical(rows: Sequence[Mapping[str, object]]) -> tuple[float, pandas.DataFrame]:
    """Average by pandas, as the benchmark's authors say: over pseudo-words, then voices, then words."""
    data = pandas.DataFrame(rows)
    data["score"] = 0.5 * (data["score word"] == data["score non word"]) + (data["score word"] > data["score non word"])
    known = data.groupby("word")[["frequency", "length"]].first()
    score = data.groupby(["word", "voice"])["score"].mean().groupby("word").mean()
    return score.mean(), known.assign(score=score)


@pytest.mark.assets
def test_the_official_example_from_its_table_of_trials(babyberta):
    found = judge(babyberta / "score_syntactic_dev_all_trials.csv", SYNTACTIC)
    assert str(found.overall) == (babyberta / "overall_accuracy_syntactic_dev.txt").read_text().strip()
    with (babyberta / "score_syntactic_dev_by_type.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    rows = found.breakdowns["type"]
    assert [(g.label, str(g.items), f"{g.score:.4f}", f"{g.std:.4f}") for g in rows] == [
        tuple(r.values()) for r in table
    ]
    assert {label: f"{score:.4f}" for label, score in found.groups.items()} == {
        row["type"]: row["score"] for row in table
    }
    assert found.interval.low < 0.69 < 0.71 < found.interval.high and found.pairs == 2160


@pytest.mark.assets
def test_the_official_example_from_its_probabilities(babyberta, write_table):
    with (babyberta / "score_syntactic_dev_all_trials.csv").open(encoding="utf-8") as file:
        trials = list(csv.DictReader(file))
    gold = [
        {"filename": f"{trial[column].replace(' ', '_')}_en-US-Wavenet-B", "id": trial["id"], "voice": voice,
         "type": trial["type"], "subtype": trial["subtype"], "transcription": trial[column], "correct": correct}
        for voice in ("B", "I") for trial in trials for column, correct in (("sentence", 1), ("non sentence", 0))
    ]  # fmt: skip
    for row in gold[4320:]:
        row["filename"] = row["filename"].replace(
            "-B", "-I"
        )  # a system that reads is asked about the first voice alone
    found = judge(None, SYNTACTIC, probabilities=babyberta / "dev.txt", gold=write_table("gold.csv", gold))
    assert str(found.overall) == (babyberta / "overall_accuracy_syntactic_dev.txt").read_text().strip()
    assert found.notes == () and len(found.trials) == 2160


@pytest.mark.assets
def test_the_official_lexical_example(librivox):
    found = judge(librivox / "score_lexical_dev_all_trials.csv", LEXICAL)
    assert str(found.overall) == (librivox / "overall_accuracy_lexical_dev.txt").read_text().strip()
    for name in ("frequency", "length"):
        with (librivox / f"score_lexical_dev_by_{name}.csv").open(encoding="utf-8") as file:
            table = [tuple(row.values()) for row in csv.DictReader(file)]
        groups = [(g.label, str(g.items), _printed(g.score), _printed(g.std)) for g in found.breakdowns[name]]
        assert groups == table


def _printed(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def test_lexical_averages_by_hand(write_table):
    """Over pseudo-words, then voices, then words; a tie counts half, unless the table was rounded after it was scored."""
    columns = ("id", "voice", "frequency", "word", "length", "score word", "non word", "score non word", "score")
    rows = [
        (1, "A", 3, "cat", 3, -1.0, "dat", -2.0, 1.0),
        (2, "A", 3, "cat", 3, -1.0, "gat", -1.0, 0.5),  # a tie: (1 + 0.5) / 2 in voice A
        (1, "B", 3, "cat", 3, -2.0, "dat", -1.0, 0.0),
        (2, "B", 3, "cat", 3, -2.0, "gat", -3.0, 1.0),  # (0 + 1) / 2 in voice B: (0.75 + 0.5) / 2 for the word
        (3, "A", 30, "sunny", 4, -1.5, "sully", -1.5, 1.0),  # equal as printed alone
        (3, "B", 30, "sunny", 4, -3.0, "sully", -2.0, 0.0),  # (1 + 0) / 2 for the word
        (4, "A", 0, "dog", 3, -1.0, "dop", -2.0, 1.0),  # heard in one voice: 1 for the word
    ]
    found = judge(write_table("trials.csv", [dict(zip(columns, row, strict=True)) for row in rows]), LEXICAL)
    assert found.overall == pytest.approx((0.625 + 0.5 + 1) / 3, rel=1e-15)
    assert (found.pairs, len(found.trials), found.total.items, found.ties) == (4, 7, 3, 1)
    assert found.groups == {"oov": 1.0, "1-5": 0.625, "21-100": 0.5}
    assert [(g.label, g.items, g.score) for g in found.breakdowns["length"]] == [("3", 2, 0.8125), ("4", 1, 0.5)]


@pytest.mark.parametrize("voices", [["A"], ["A", "B"], ["A", "B", "C"]])
def test_lexical_averages_are_the_official_ones(write_table, voices):
    rows = words(300, voices)
    found = judge(write_table("trials.csv", rows), LEXICAL)
    overall, table = official_lexical(rows)
    assert found.overall == overall  # to the last bit
    bands = pandas.cut(table.frequency, [0, 1, 5, 20, 100, float("inf")], right=False,
                       labels=["oov", "1-5", "6-20", "21-100", ">100"])  # fmt: skip
    for name, groups in (("frequency", table.score.groupby(bands)), ("length", table.score.groupby(table.length))):
        wanted = groups.agg(["count", "mean", "std"])
        assert [(g.label, g.items) for g in found.breakdowns[name]] == [(str(k), n) for k, n in wanted["count"].items()]
        assert [g.score for g in found.breakdowns[name]] == pytest.approx(list(wanted["mean"]), rel=1e-14)
        assert [g.std for g in found.breakdowns[name]] == pytest.approx(list(wanted["std"]), rel=1e-12)
    assert (found.pairs, len(found.trials), found.total.items) == (len(rows) // len(voices), len(rows), 300)
    assert found.groups == {group.label: group.score for group in found.breakdowns["frequency"]}


def test_words_weigh_the_same_however_many_pseudo_words_they_have(write_table):
    rows = [
        {"word": "cat", "non word": other, "score word": -1, "score non word": -2} for other in ("dat", "gat", "lat")
    ]
    rows += [{"word": "sun", "non word": "sul", "score word": -2, "score non word": -1}]
    found = judge(write_table("trials.csv", rows), LEXICAL)
    assert found.overall == 0.5 and found.total.items == 2 and found.breakdowns == {}
    assert found.notes == ("no column frequency: no breakdown by frequency", "no column length: no breakdown by length")


def test_syntactic_averages_are_the_official_ones(write_table):
    rows = sentences(200, ["A", "B", "C"])
    data = pandas.DataFrame(rows)
    gap = data["score sentence"] - data["score non sentence"]
    data["score"] = 0.5 * (gap == 0) + (gap > 0)
    by_pair = data.groupby(["type", "subtype", "id"])["score"].mean().reset_index()
    found = judge(write_table("trials.csv", rows), SYNTACTIC)
    assert found.overall == by_pair.score.mean()
    assert found.groups == pytest.approx(by_pair.groupby("type").score.mean().to_dict(), rel=1e-14)
    assert found.ties == (gap == 0).sum()


@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_spelling_and_order_of_columns_do_not_matter(write_table, separator):
    rows = sentences(30, ["A", "B"])
    wanted = judge(write_table("plain.csv", rows), SYNTACTIC)
    turned = [{key.upper().replace(" ", "_"): row[key] for key in reversed(SENTENCES)} | {"more": "x"} for row in rows]
    found = judge(write_table("turned.txt", turned, separator), SYNTACTIC)
    assert (found.overall, found.groups, found.interval) == (wanted.overall, wanted.groups, wanted.interval)


def test_without_voices_rows_of_one_pair_are_averaged(write_table):
    rows = sentences(30, ["A", "B"])
    wanted = judge(write_table("plain.csv", rows), SYNTACTIC)
    found = judge(write_table("mute.csv", [{k: v for k, v in row.items() if k != "voice"} for row in rows]), SYNTACTIC)
    assert (found.overall, found.groups) == (wanted.overall, wanted.groups)
    assert found.notes == ("pair and voice named before, averaged with it: 30 of 60 trials",)


def test_ties_count_half_unless_the_table_was_rounded(write_table):
    row = {
        "id": 1,
        "type": "t",
        "sentence": "a",
        "score sentence": "-1.5000",
        "non sentence": "b",
        "score non sentence": "-1.5",
    }
    assert judge(write_table("tie.csv", [row]), SYNTACTIC).overall == 0.5
    rounded = judge(write_table("rounded.csv", [row | {"score": "0.0000"}]), SYNTACTIC)
    assert rounded.overall == 0.0 and rounded.ties == 0
    assert rounded.notes == (
        "equal as printed, the recorded score is taken: 1 of 1 trials",
        "no column subtype: no breakdown by subtype",
    )
    against = row | {"score sentence": "-1.4", "score": "0.0"}  # what the numbers say is never overruled
    assert judge(write_table("against.csv", [against]), SYNTACTIC).overall == 1.0


def test_pairs_of_one_text_are_counted(write_table):
    rows = sentences(4, ["A"])
    rows[2]["non sentence"] = rows[2]["sentence"]
    found = judge(write_table("trials.csv", rows), SYNTACTIC)
    assert found.identical == 1
    assert found.notes[0] == "same text or same tokens twice, counts half: 1 of 4 trials"


def gold(name: str = "{0}-{1}") -> list[dict[str, object]]:
    """Return single words in two voices; a right text is there once for each of its two wrong ones."""
    return [
        {"filename": name.format(text, voice), "id": pair, "voice": voice, "frequency": 3, "word": text, "phones": text,
         "length": 3, "correct": correct}
        for voice in "AB" for pair, texts in enumerate((("cat", "dat"), ("cat", "gat"), ("sun", "sul")))
        for text, correct in zip(texts, (1, 0), strict=True)
    ]  # fmt: skip


def probabilities(path: Path, rows: Sequence[Mapping[str, object]], scores: Mapping[str, float]) -> Path:
    path.write_text("".join(f"{row['filename']} {scores[str(row['word'])]}\n" for row in rows), encoding="utf-8")
    return path


def test_probabilities_of_a_system_that_reads_or_hears(write_table, tmp_path):
    rows, scores = gold(), {"cat": -1.0, "dat": -2.0, "gat": -0.5, "sun": -1.0, "sul": -1.0}
    table = write_table("gold.csv", rows)
    for given, count in ((rows, 6), (rows[:6], 3), (rows[::-1], 6)):
        found = judge(None, LEXICAL, probabilities=probabilities(tmp_path / "dev.txt", given, scores), gold=table)
        assert (found.overall, len(found.trials), found.ties) == (0.5, count, count // 3)
        assert found.total.items == 2 and found.groups == {"1-5": 0.5}


def test_phones_stand_for_words_where_wrong_ones_have_no_spelling(write_table, tmp_path):
    rows = gold()
    scores = {"cat": -1.0, "dat": -2.0, "gat": -0.5, "sun": -1.0, "sul": -1.0}
    given = probabilities(tmp_path / "dev.txt", rows, scores)
    spelled = [
        row | {"word": row["word"] if row["correct"] else "", "phones": " ".join(str(row["word"]))} for row in rows
    ]
    found = judge(None, LEXICAL, probabilities=given, gold=write_table("gold.csv", spelled))
    assert {trial.pair.good for trial in found.trials} == {"c a t", "s u n"}


TRIAL = dict(zip(SENTENCES, (1, "A", "t", "s", "good", -1, "bad", -2), strict=True))


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{k: v for k, v in TRIAL.items() if k != "score non sentence"}], "'score non sentence' is missing; found id, voice"),
        ([{k: v for k, v in TRIAL.items() if k != "type"}], "column 'type' is missing"),
        ([{k: v for k, v in TRIAL.items() if k != "id"}], "column 'id' is missing"),
        ([TRIAL | {"type": ""}], "line 2: 'type' is empty"),
        ([TRIAL, TRIAL | {"score sentence": "high"}], "line 3: 'score sentence' is 'high'; it must be a number"),
        ([TRIAL | {"score sentence": "nan"}], "line 2: 'score sentence' is nan; it must be finite"),
        ([TRIAL | {"score non sentence": "-inf"}], "must be finite"),
        ([TRIAL | {"ID": 3}], "two columns are named 'id'"),
    ],
)  # fmt: skip
def test_bad_trials(write_table, rows, match):
    with pytest.raises(ProbeError, match=match):
        judge(write_table("trials.csv", rows), SYNTACTIC)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "no rows"),
        (b"\xef\xbb\xbfid,type\n", "no rows"),
        (b"id,type\n1,2,3\n", "line 2: 3 cells, but the header has 2"),
        (b"id,type\n1,\xe9\n", "not UTF-8 at byte 10"),
        (b"id,id\n1,2\n", "two columns are named 'id'"),
    ],
)
def test_damaged_tables(tmp_path, content, match):
    (tmp_path / "trials.csv").write_bytes(content)
    with pytest.raises(ProbeError, match=match):
        judge(tmp_path / "trials.csv", SYNTACTIC)


def test_frequencies_must_be_numbers(write_table):
    rows = words(3, ["A"])
    for value, match in (("often", "holds 'often'; its groups are bands"), (-1, "holds -1, below the first band")):
        with pytest.raises(ProbeError, match=match):
            judge(write_table("trials.csv", [row | {"frequency": value} for row in rows]), LEXICAL)


def test_bad_probabilities(write_table, tmp_path):
    rows, scores = gold(), dict.fromkeys(("cat", "dat", "gat", "sun", "sul"), -1.0)
    table, path = write_table("gold.csv", rows), tmp_path / "dev.txt"
    bad = {
        "": "no rows",
        "cat-A\n": "line 1: a name and a number are needed",
        "cat-A x\n": "line 1: a name and a number",
        "cat-A nan\n": "probability of cat-A is nan",
        "cat-A -1\n": "4 texts of .*gold.csv are not in it, the first is dat-A",
        "cat-A -1\ncat-A -2\n": "cat-A has several probabilities",
    }
    for content, match in bad.items():
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ProbeError, match=match):
            judge(None, LEXICAL, probabilities=path, gold=table)
    more = [*rows, rows[0] | {"filename": "cow-A", "word": "cat"}]
    with pytest.raises(ProbeError, match=r"gold.csv: 1 texts of .*dev.txt are not in it, the first is cow-A"):
        judge(None, LEXICAL, probabilities=probabilities(path, more, scores), gold=table)


def test_bad_gold(write_table, tmp_path):
    rows, scores = gold(), dict.fromkeys(("cat", "dat", "gat", "sun", "sul"), -1.0)
    path = probabilities(tmp_path / "dev.txt", rows, scores)
    bad = [
        ([row for row in rows if row["word"] != "dat"], "voice A, id 0: 1 right and 0 wrong texts do not make pairs"),
        ([row | {"correct": "yes"} for row in rows], "line 2: 'correct' is 'yes'; it must be 1 or 0"),
        ([row | {"word": "", "phones": ""} for row in rows], "'phones' is empty"),
        ([{k: v for k, v in row.items() if k != "filename"} for row in rows], "column 'filename' is missing"),
    ]
    for table, match in bad:
        if "right" in match:
            path = probabilities(tmp_path / "dev.txt", table, scores)
        with pytest.raises(ProbeError, match=match):
            judge(None, LEXICAL, probabilities=path, gold=write_table("gold.csv", table))
    with pytest.raises(ProbeError, match="give a table of trials, or probabilities together with their gold table"):
        judge(None, LEXICAL, probabilities=path)
    with pytest.raises(ProbeError, match="benchmark blimp has no table of single texts"):
        judge(None, "blimp", probabilities=path, gold=path)

"""Windows: every token is predicted once, whatever the stride; texts have names and languages."""

from pathlib import Path

import pytest

from lillama.errors import DataError
from lillama.evaluation.windows import cut_windows, label_texts, languages, name_texts, spread
from lillama.model.tokenizer import load_tokenizer

TEXT = "abcdefghij" * 5 + "xyz"  # 53 tokens of a byte each


@pytest.mark.parametrize("stride", [1, 3, 7, 9, 10, None])
def test_every_token_but_the_first_is_predicted_once(tiny, stride):
    windows = cut_windows("a", TEXT, load_tokenizer(tiny), 10, stride)
    step = stride or 10
    assert windows.ids.shape == ((53 - 10) // step + 1, 10)
    told = windows.predicted(slice(None))
    seen = [step * row + 1 + at for row, at in told.nonzero().tolist()]
    missed = 10 if step == 10 else 0  # a window's first token has nothing before it
    unseen = [at for at in range(1, len(windows.ids) * step + 10 - step) if at not in seen]
    assert len(seen) == len(set(seen)) == windows.tokens
    assert unseen == ([] if not missed else [10 * row for row in range(1, len(windows.ids))])


def test_predictions_of_some_windows_are_those_of_all(tiny):
    windows = cut_windows("a", TEXT, load_tokenizer(tiny), 10, 4)
    told = windows.predicted(slice(None))
    assert windows.predicted(slice(0, 1)).equal(told[:1]) and windows.predicted(slice(1, 4)).equal(told[1:4])


def test_few_windows_are_spread_over_the_text(tiny):
    tokenizer = load_tokenizer(tiny)
    every, few = cut_windows("a", TEXT, tokenizer, 5), cut_windows("a", TEXT, tokenizer, 5, most=3)
    assert few.ids.tolist() == [every.ids[index].tolist() for index in (0, 3, 6)]
    assert few.tokens_per_byte == every.tokens_per_byte
    assert spread(4, None).tolist() == spread(4, 9).tolist() == [0, 1, 2, 3]


def test_a_short_text_is_one_window(tiny):
    windows = cut_windows("a", "abc", load_tokenizer(tiny), 10, 7)
    assert windows.ids.shape == (1, 3) and windows.tokens == 2


@pytest.mark.parametrize(
    ("length", "stride", "most", "match"),
    [
        (1, None, None, "seq_len is 1"),
        (10, 0, None, "stride is 0"),
        (10, 11, None, "stride is 11"),
        (10, None, 0, "windows is 0"),
    ],
)
def test_senseless_numbers_are_refused(tiny, length, stride, most, match):
    with pytest.raises(DataError, match=match):
        cut_windows("a", TEXT, load_tokenizer(tiny), length, stride, most)


def test_languages_are_read_from_labels_alone(tmp_path):
    odd = tmp_path / "fra=a.txt"
    odd.write_text("a")
    assert label_texts(["fra=b.txt", odd, Path("x/c.txt")]) == [
        ("fra", Path("b.txt")),
        (None, odd),
        (None, Path("x/c.txt")),
    ]
    texts = ["fra=a/one.txt", "eng=a/two.txt", "three.txt", "fra=b/two.txt"]
    assert languages(texts) == {"fra": ["one", "b/two.txt"], "eng": ["a/two.txt"]}
    assert languages([*texts, *texts]) == {
        "fra": ["a/one.txt", "b/two.txt"],
        "eng": ["a/two.txt"],
    }  # a text counts once
    assert list(name_texts("fra=one.txt")) == ["one"] and languages("one.txt") == {}

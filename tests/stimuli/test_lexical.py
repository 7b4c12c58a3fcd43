"""Pseudo-words are like words in all that is counted, and are none."""

import random
from collections import Counter

import pytest

from lillama.errors import ProbeError
from lillama.probing.stimuli.lexical import PER_WORD
from lillama.probing.stimuli.pseudowords import phonotactics
from lillama.probing.stimuli.sets import built_in_vocabulary, lexical_set, real_words
from lillama.probing.stimuli.vocabulary import Vocabulary, count_words


def test_no_pseudo_word_is_a_word(language, words):
    known = built_in_vocabulary(language).known | real_words()
    assert not known & {row["non word"] for row in words.rows}
    assert all(row["word"] in known for row in words.rows)


def test_one_or_two_letters_are_changed_within_their_class(language, words):
    for row in words.rows:
        pairs = list(zip(row["word"], row["non word"], strict=True))
        changed = [(ours, theirs) for ours, theirs in pairs if ours != theirs]
        assert 1 <= len(changed) <= 2
        assert all((ours in language.vowels) == (theirs in language.vowels) for ours, theirs in changed)


def test_graphemes_keep_their_pattern_and_letters_their_company(language, words):
    rules = phonotactics(language, built_in_vocabulary(language).counts)
    for row in words.rows:
        assert rules.pattern(row["word"]) == rules.pattern(row["non word"])
        padded = ("", "", *row["non word"], "")
        assert all(padded[start : start + 3] in rules.trigrams for start in range(len(padded) - 2))


def test_every_word_has_as_many_pseudo_words_and_no_pseudo_word_comes_twice(words):
    asked = Counter(row["word"] for row in words.rows)
    assert len(words.rows) == 1200 and set(asked.values()) == {PER_WORD}
    assert len({row["non word"] for row in words.rows}) == len(words.rows)


def test_ngram_models_of_letters_stay_at_chance(words):
    assert len(words.control["letters"]) == 4
    assert all(abs(value - 0.5) <= 0.02 for value in words.control["letters"].values())


def test_a_set_is_given_by_its_seed_and_grows_at_its_end(language, words):
    again, other = (lexical_set(language, built_in_vocabulary(language), "test", 40, seed) for seed in (0, 1))
    assert again.rows == words.rows[:40]
    assert other.rows != again.rows


def test_known_words_are_no_pseudo_words(language, words):
    banned = {str(row["non word"]) for row in words.rows[:40]}
    again = lexical_set(language, built_in_vocabulary(language).with_known(banned), "test", 40, 0)
    assert not banned & {row["non word"] for row in again.rows}


def test_neighbours_are_all_strings_of_the_pattern_with_heard_trigrams(language):
    rules = phonotactics(language, ["tat", "tot", "pat", "pit"])
    assert set(rules.neighbours("tot", random.Random(0))) == {"tat", "pat", "pit"}


def test_names_are_known_but_not_counted():
    vocabulary = count_words(["Le roi vit Paris. L'ours dort, dit le roi."], "text")
    assert vocabulary.counts == {"roi": 2, "vit": 1, "ours": 1, "dort": 1, "dit": 1, "le": 1}
    assert {"paris", "le"} <= vocabulary.known


def test_too_few_words(language):
    with pytest.raises(ProbeError, match="list: no word of at least 4 letters has 4 pseudo-words"):
        lexical_set(language, Vocabulary({"xyzzy": 1}, frozenset(), "list"), "test", 8, 0)

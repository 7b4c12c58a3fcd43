"""Right sentences agree, wrong ones do not, and no model of one or two words in a row can tell them apart."""

import random
from collections import Counter
from itertools import pairwise

import pytest

from lillama.probing.stimuli.language import load_language
from lillama.probing.stimuli.ngrams import count_ngrams
from lillama.probing.stimuli.sentences import FEWEST, tokens, usable_lists
from lillama.probing.stimuli.sets import syntactic_set
from lillama.probing.stimuli.vocabulary import Vocabulary

PHENOMENA = {
    "adj_noun_order", "noun_verb_order", "anaphor_gender_agreement", "anaphor_number_agreement",
    "determiner_noun_agreement", "noun_verb_agreement",
}  # fmt: skip


def cut(stimuli):
    return [(tokens(row["sentence"]), tokens(row["non sentence"])) for row in stimuli.rows]


def test_six_phenomena_equally_often(sentences):
    assert Counter(row["type"] for row in sentences.rows) == dict.fromkeys(PHENOMENA, 100)


def test_no_unigram_or_bigram_model_does_better_than_chance(sentences):
    """Not only trained ones: random counts of random order stand for any model."""
    chance = random.Random(0)
    texts = [list(right) for right, _ in cut(sentences)]
    for text in texts:
        chance.shuffle(text)
    trained = Counter({tuple(text): chance.randint(1, 100) for text in texts})
    for order in (1, 2):
        assert count_ngrams(trained, order).accuracy(cut(sentences)) == 0.5
    assert all(value == 0.5 for models in sentences.control.values() for value in models.values())


def test_three_words_in_a_row_can_tell(sentences):
    right = Counter(right for right, _ in cut(sentences))
    assert count_ngrams(right, 3).accuracy(cut(sentences)) > 0.7


def test_each_pair_stands_beside_its_mirror_image(sentences):
    for (right, wrong), (right_too, wrong_too) in zip(*[iter(cut(sentences))] * 2, strict=True):
        gained = Counter(pairwise(right))
        gained.subtract(pairwise(wrong))
        lost = Counter(pairwise(wrong_too))
        lost.subtract(pairwise(right_too))
        assert {k: v for k, v in gained.items() if v} == {k: v for k, v in lost.items() if v}


def test_no_pair_comes_twice_and_no_sentence_is_right_and_wrong(sentences):
    pairs = {frozenset((row["sentence"], row["non sentence"])) for row in sentences.rows}
    assert len(pairs) == len(sentences.rows)
    assert not {row["sentence"] for row in sentences.rows} & {row["non sentence"] for row in sentences.rows}


def test_orders_keep_their_words_and_agreements_change_one(sentences):
    for row, (right, wrong) in zip(sentences.rows, cut(sentences), strict=True):
        if row["type"].endswith("order"):
            assert Counter(right) == Counter(wrong)
        else:
            assert sum(ours != theirs for ours, theirs in zip(right, wrong, strict=True)) == 1


def test_sentences_are_written_as_in_books(sentences):
    for row in sentences.rows:
        for text in (row["sentence"], row["non sentence"]):
            assert text[0].isupper() and text[-1] in ".?" and "  " not in text and "{" not in text


@pytest.mark.parametrize("kind", ["sentence", "non sentence"])
def test_french_elides(kind):
    stimuli = syntactic_set(load_language("fr"), None, "test", 1200, 0)
    vowels = "aeéèêiouyœ"
    for row in stimuli.rows:
        for word, following in zip(row[kind].casefold().split(), row[kind].casefold().split()[1:], strict=False):
            assert not (word in ("le", "la", "ne", "de", "que") and following[0] in vowels), row[kind]


def agrees(row):
    """English determiners agree with the noun, which ends the sentence."""
    singular = {form for words in load_language("en").lists.values() if "many" in words.forms
                for form in [entry["one"] for entry in words.entries()]}  # fmt: skip
    *_, determiner, _, noun, _ = tokens(row)
    return (determiner in {"this", "that", "one", "every", "another"}) == (noun in singular)


def test_english_determiners_agree():
    stimuli = syntactic_set(load_language("en"), None, "test", 1200, 3)
    rows = [row for row in stimuli.rows if row["type"] == "determiner_noun_agreement"]
    assert all(agrees(row["sentence"]) and not agrees(row["non sentence"]) for row in rows)


def test_pronouns_agree(language):
    """The pronoun's gender and number are those of the subject's word list."""
    stimuli = syntactic_set(language, None, "test", 1200, 3)
    forms = {
        "en": ("himself", "herself", "themselves", "themselves"),
        "fr": ("lui-même", "elle-même", "eux-mêmes", "elles-mêmes"),
    }
    he, she, men, women = forms[language.name]
    wanted = {}
    for names, one, many in (("men", he, men), ("women", she, women)):
        for entry in language.lists[names].entries():
            wanted |= {entry["one"]: one, entry["many"]: many}
    for row in stimuli.rows:
        if row["type"].startswith("anaphor"):
            subject = next(word for word in tokens(row["sentence"]) if word in wanted)
            assert wanted[subject] in tokens(row["sentence"])
            assert wanted[subject] not in tokens(row["non sentence"])


def test_a_set_is_given_by_its_seed(language, sentences):
    assert syntactic_set(language, None, "test", 600, 1) == sentences
    assert syntactic_set(language, None, "test", 600, 2).rows != sentences.rows


def test_only_words_of_the_vocabulary_where_it_has_some():
    language = load_language("en")
    known = ["cat", "cats", "dog", "dogs", "cow", "cows", "king", "kings"]
    lists, whole = usable_lists(language, Vocabulary(dict.fromkeys(known, 1), frozenset(known), "list"))
    assert [entry["one"] for entry in lists["animals"]] == ["cat", "dog", "cow"]
    assert "animals" not in whole and "men" in whole  # one king is too few
    assert len(lists["men"]) == len(language.lists["men"].words) >= FEWEST

"""n-gram models are distributions; what two sequences share cancels exactly."""

import math

import pytest

from lillama.probing.stimuli.ngrams import EDGE, count_ngrams


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_of_what_may_follow_add_up_to_one(order):
    model = count_ngrams({tuple("abcab"): 2, tuple("cab"): 5}, order)
    context = {1: (), 2: ("a",), 3: ("c", "a")}[order]
    total = sum(math.exp(model.log_probability((*context, segment))) for segment in ("a", "b", "c", EDGE))
    assert total == pytest.approx(1)


def test_words_in_another_order_are_a_tie_for_unigrams_and_ties_count_half():
    model = count_ngrams({("the", "red", "house"): 7, ("red",): 0.1}, 1)
    pair = ("the", "red", "house"), ("house", "the", "red")
    assert model.preference(*pair) == 0 and model.accuracy([pair]) == 0.5


def test_the_more_frequent_sequence_is_preferred():
    model = count_ngrams({("a", "b"): 3, ("b", "a"): 1}, 2)
    assert model.accuracy([(("a", "b"), ("b", "a")), (("b", "a"), ("a", "b"))]) == 0.5
    assert model.accuracy([(("a", "b"), ("b", "a"))]) == 1

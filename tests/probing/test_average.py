"""Accuracies: of all items and of groups, each with its interval."""

import numpy as np
import pytest

from lillama.evaluation.intervals import Interval
from lillama.probing.average import Item, breakdown, overall
from lillama.probing.benchmark import Grouping


def items(scores, **fields) -> tuple[Item, ...]:
    return tuple(Item({key: value[i] for key, value in fields.items()}, score) for i, score in enumerate(scores))


def test_one_item_tells_no_spread():
    single = overall(items([0.5]), None, 0)
    assert (single.score, single.std, single.interval) == (0.5, None, Interval(0.5))


def test_a_paired_difference_is_surer_than_two_intervals():
    chance = np.random.default_rng(3)
    dense = (chance.random(300) < 0.8).astype(float)
    small = np.where(chance.random(300) < 0.05, 0.0, dense)
    found = overall(items(small.tolist()), items(dense.tolist()), 0)
    assert found.difference == pytest.approx(small.mean() - dense.mean())
    own, apart = found.interval, found.difference_interval
    assert apart.low < found.difference < apart.high <= 0.0
    assert apart.high - apart.low < (own.high - own.low) / 1.5
    same = overall(items(dense.tolist()), items(dense.tolist()), 0)
    assert (same.difference, same.difference_interval) == (0.0, Interval(0.0, 0.0, 0.0))


def test_groups_come_in_order_and_empty_bands_stay():
    scored = items([1.0, 0.0, 1.0], size=["10", "9", "10"], count=["0", "5", "7.5"])
    assert [(g.label, g.items, g.score) for g in breakdown("size", Grouping(), scored, None, 0)] == [
        ("9", 1, 0.0),
        ("10", 2, 1.0),
    ]
    bands = Grouping("count", (0, 1, 5), ("none", "few", "many"))
    found = breakdown("frequency", bands, scored, None, 0)
    assert [(g.label, g.items, g.score) for g in found] == [("none", 1, 1.0), ("few", 0, None), ("many", 2, 0.5)]
    assert found[1].interval is None

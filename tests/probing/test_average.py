"""Intervals: where they lie, and that they depend on nothing but values and seed."""

import numpy as np
import pytest

from lillama.probing.average import Item, bootstrap, breakdown, overall
from lillama.probing.benchmark import Grouping


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def items(scores, **fields) -> tuple[Item, ...]:
    return tuple(Item({key: value[i] for key, value in fields.items()}, score) for i, score in enumerate(scores))


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).choice([0.0, 0.5, 1.0], size=400, p=[0.2, 0.1, 0.7])
    low, high = bootstrap(values, rng())
    half = 1.96 * values.std() / 20  # the central limit theorem
    assert low == pytest.approx(values.mean() - half, abs=0.004) and high == pytest.approx(
        values.mean() + half, abs=0.004
    )
    assert bootstrap(values[::-1].copy(), rng()) == (low, high)


def test_the_interval_covers_as_often_as_it_says():
    chance, inside = np.random.default_rng(2), 0
    for _ in range(400):
        low, high = bootstrap((chance.random(80) < 0.6).astype(float), chance)
        inside += low <= 0.6 <= high
    assert 0.90 <= inside / 400 <= 0.98


def test_all_equal_leaves_no_doubt():
    assert bootstrap(np.ones(5), rng()) == (1.0, 1.0)
    single = overall(items([0.5]), None, 0)
    assert (single.score, single.std, single.interval) == (0.5, None, None)  # one item tells no spread


def test_a_paired_difference_is_surer_than_two_intervals():
    chance = np.random.default_rng(3)
    dense = (chance.random(300) < 0.8).astype(float)
    small = np.where(chance.random(300) < 0.05, 0.0, dense)
    found = overall(items(small.tolist()), items(dense.tolist()), 0)
    assert found.difference == pytest.approx(small.mean() - dense.mean())
    low, high = found.difference_interval or (0, 0)
    assert low < found.difference < high <= 0.0 and high - low < (found.interval[1] - found.interval[0]) / 1.5
    same = overall(items(dense.tolist()), items(dense.tolist()), 0)
    assert (same.difference, same.difference_interval) == (0.0, (0.0, 0.0))


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

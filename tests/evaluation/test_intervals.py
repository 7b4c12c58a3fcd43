"""The bootstrap: deterministic, as wide as theory says, narrow where pairs agree."""

import numpy as np
import pytest
import torch

from lillama.evaluation import intervals
from lillama.evaluation.intervals import Interval, bootstrap, mean_interval


def seeded(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def mean(sums):
    return sums["x"] / sums["n"]


@pytest.fixture
def columns():
    return {"x": torch.from_numpy(seeded(5).standard_normal(400)), "n": torch.ones(400, dtype=torch.float64)}


def test_the_same_seed_gives_the_same_interval(columns):
    first, again, other = (bootstrap(columns, seeded(seed)).interval(mean) for seed in (0, 0, 1))
    assert first == again != other and first.value == other.value


def test_the_interval_of_a_mean_is_as_wide_as_theory_says(columns):
    found = bootstrap(columns, seeded()).interval(mean)
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * columns["x"].std().item() / 20, rel=0.1)


def test_pairs_cancel_what_both_share(columns):
    harder = columns | {"y": columns["x"] + 0.1}
    sums = bootstrap(harder, seeded())
    alone, paired = sums.interval(mean), sums.interval(lambda s: (s["y"] - s["x"]) / s["n"])
    assert paired.low == pytest.approx(0.1) and paired.high == pytest.approx(0.1)
    assert alone.high - alone.low > 0.1


def test_columns_may_have_parts(columns):
    parts = {"x": torch.stack([columns["x"], -columns["x"]], dim=1), "n": columns["n"]}
    found = bootstrap(parts, seeded()).interval(lambda s: s["x"].sum(-1) / s["n"])
    assert found.low == pytest.approx(0, abs=1e-12) and found.high == pytest.approx(0, abs=1e-12)
    half = bootstrap(parts, seeded()).interval(lambda s: s["x"][..., 0] / s["n"])
    whole = bootstrap(columns, seeded()).interval(mean)
    assert [half.value, half.low, half.high] == pytest.approx([whole.value, whole.low, whole.high])


def test_one_document_has_no_interval(columns):
    one = {name: column[:1] for name, column in columns.items()}
    assert bootstrap(one, seeded()).interval(mean) == Interval(columns["x"][0].item(), None, None)


def test_the_interval_of_few_values_is_that_of_the_mean():
    values = np.random.default_rng(1).choice([0.0, 0.5, 1.0], size=400, p=[0.2, 0.1, 0.7])
    found = mean_interval(values, seeded())
    half = 1.96 * values.std() / 20  # the central limit theorem
    assert found.value == pytest.approx(values.mean())
    assert [found.low, found.high] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.004)
    assert mean_interval(values[::-1].copy(), seeded()) == found


def test_the_interval_covers_as_often_as_it_says():
    chance, inside = np.random.default_rng(2), 0
    for _ in range(400):
        found = mean_interval((chance.random(80) < 0.6).astype(float), chance)
        inside += found.low <= 0.6 <= found.high
    assert 0.90 <= inside / 400 <= 0.98


def test_all_equal_leaves_no_doubt():
    assert mean_interval(np.ones(5), seeded()) == Interval(1.0, 1.0, 1.0)


def test_draws_do_not_depend_on_how_many_are_held_at_once(columns, monkeypatch):
    whole = bootstrap(columns, seeded()).interval(mean)
    monkeypatch.setattr(intervals, "AT_ONCE", 399 * 400)
    parts = bootstrap(columns, seeded()).interval(mean)
    assert [parts.low, parts.high] == pytest.approx([whole.low, whole.high], rel=1e-12)

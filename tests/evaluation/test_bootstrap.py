"""The bootstrap: deterministic, as wide as theory says, narrow where pairs agree."""

import pytest
import torch

from lillama.evaluation.bootstrap import Interval, bootstrap


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mean(sums):
    return sums["x"] / sums["n"]


@pytest.fixture
def columns():
    return {"x": torch.randn(400, generator=seeded(), dtype=torch.float64), "n": torch.ones(400, dtype=torch.float64)}


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

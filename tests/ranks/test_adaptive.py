"""Adaptive ranks: within the budget, never predicted to be worse than uniform ones, and the best there are on toy models."""

from itertools import product

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lillama.errors import BudgetError, OutputError
from lillama.lowrank.storage import Storage
from lillama.model.spec import BlockSpec, LinearSpec, ModelSpec
from lillama.ranks.adaptive import Adaptive, Shift
from lillama.ranks.allocators import TOLERANCE, Uniform
from lillama.ranks.plan import RankPlan
from lillama.ranks.spectra import Spectra

PLAIN, PIVOT, EIGHT = Storage("plain"), Storage("pivot"), Storage("pivot", bits=8)
shapes = st.tuples(st.integers(24, 200), st.integers(24, 200))
sketches = st.lists(st.lists(shapes, min_size=1, max_size=4), min_size=1, max_size=3)
RELAXED = settings(max_examples=25, deadline=None)


def drawn(sketch: list[list[tuple[int, int]]], outside: int = 1000) -> ModelSpec:
    blocks = []
    for index, pairs in enumerate(sketch):
        linears = tuple(LinearSpec(f"layers.{index}.{i}", *pair) for i, pair in enumerate(pairs))
        blocks.append(BlockSpec(f"layers.{index}", index, sum(x.params for x in linears), linears))
    return ModelSpec("Any", 16, "bfloat16", 2, outside + sum(block.params for block in blocks), tuple(blocks))


def made_up(spec: ModelSpec, seed: int) -> Spectra:
    """Return spectra that fall at different rates from different heights."""
    rng = np.random.default_rng(seed)
    return Spectra({
        linear.name: np.exp(rng.normal() - rng.uniform(0.01, 0.2) * np.arange(min(linear.out_features, linear.in_features)))
        for linear in spec.linears
    })  # fmt: skip


@RELAXED
@given(sketches, st.floats(0.3, 0.95), st.integers(0, 99), st.sampled_from([PLAIN, PIVOT]), st.sampled_from([1, 4, 8]))
@example([[(24, 24), (24, 36)]], 0.5, 1, PLAIN, 4)
def test_the_budget_is_met_from_below_and_no_plan_is_predicted_to_be_worse_than_uniform(
    sketch, keep: float, seed: int, storage: Storage, multiple: int
) -> None:
    spec = drawn(sketch)
    spectra, allocate = made_up(spec, seed), Adaptive(multiple_of=multiple, floor=0.0)
    try:
        plan = allocate(spec, keep, "blocks", storage, spectra)
    except BudgetError:
        return
    even = Uniform(multiple_of=multiple)(spec, keep, "blocks", storage)
    target = spec.params - spec.block_params + int(keep * spec.block_params)
    assert plan.kept_params <= target
    coarsest = max(linear.out_features + linear.in_features for linear in spec.linears)
    assert target - plan.kept_params <= max(TOLERANCE * spec.block_params, 2 * coarsest)
    assert spectra.rise(plan) <= spectra.rise(even) * 1.02 + 1e-9


def test_on_a_toy_model_no_other_plan_of_the_budget_is_predicted_to_be_better() -> None:
    spec = drawn([[(32, 24), (24, 32)], [(40, 24)]], outside=0)
    spectra = made_up(spec, 3)
    allocate = Adaptive(multiple_of=4, floor=0.0)
    plan = allocate(spec, 0.6, "blocks", PLAIN, spectra)
    choices = [[*range(4, 25, 4), None] for _ in spec.linears]
    plans = (
        RankPlan(spec, dict(zip((x.name for x in spec.linears), ranks, strict=True))) for ranks in product(*choices)
    )
    best = min(spectra.rise(other) for other in plans if other.kept_params <= plan.kept_params)
    assert spectra.rise(plan) == pytest.approx(best, rel=1e-9)


def test_linears_that_lose_little_give_their_budget_to_those_that_lose_much() -> None:
    spec = drawn([[(64, 64), (64, 64)]])
    flat, steep = np.ones(64), np.exp(-np.arange(64.0))
    plan = Adaptive(multiple_of=4)(spec, 0.6, "blocks", PIVOT, Spectra({"layers.0.0": flat, "layers.0.1": steep}))
    assert (plan["layers.0.0"] or 64) > 2 * (plan["layers.0.1"] or 64)


@pytest.mark.parametrize("floor", [0.25, 0.5, 1.0])
def test_no_rank_is_below_the_floor(floor: float) -> None:
    spec = drawn([[(64, 96), (96, 64)], [(64, 64)]])
    even = Uniform(multiple_of=1)(spec, 0.6, "blocks", PLAIN)
    plan = Adaptive(multiple_of=1, floor=floor)(spec, 0.6, "blocks", PLAIN, made_up(spec, 1))
    for linear, rank in plan:
        assert rank is None or rank >= floor * (even[linear.name] or 64) - 1


def test_without_spectra_the_plan_is_uniform() -> None:
    spec = drawn([[(64, 96)], [(96, 64)]])
    assert Adaptive()(spec, 0.7, "blocks", PIVOT) == Uniform()(spec, 0.7, "blocks", PIVOT)


def test_candidates_lie_between_uniform_and_adaptive_and_within_the_budget() -> None:
    spec = drawn([[(64, 96), (96, 64)], [(128, 64)]])
    spectra = made_up(spec, 5)
    plans = Adaptive(multiple_of=2, mix=(1.0, 0.5)).candidates(spec, 0.6, "blocks", PIVOT, spectra)
    assert [share for share, _ in plans] == [0.0, 0.5, 1.0]
    rises = [spectra.rise(plan) for _, plan in plans]
    assert rises == sorted(rises, reverse=True) and rises[0] > rises[2]
    target = spec.params - spec.block_params + int(0.6 * spec.block_params)
    assert all(plan.kept_params <= target for _, plan in plans)


@RELAXED
@given(sketches, st.floats(0.4, 0.9), st.integers(0, 9), st.sampled_from([PLAIN, PIVOT, EIGHT]))
def test_bytes_are_a_budget_too(sketch, share: float, seed: int, storage: Storage) -> None:
    spec = drawn(sketch)
    most = int(share * spec.params * spec.bytes_per_param)
    try:
        plan = Adaptive(multiple_of=2, floor=0.0)(spec, 0.5, "model", storage, made_up(spec, seed), most)
    except BudgetError:
        return
    assert plan.kept_bytes <= most
    if storage.bits == 8 and share > 0.7:
        assert made_up(spec, seed).rise(plan) < 1e-3  # eight bits hold every rank in little more than half of the bytes


def test_unreachable_bytes_are_refused_with_what_is_reachable() -> None:
    spec = drawn([[(64, 64)]])
    with pytest.raises(BudgetError, match="bytes 100 are not reachable: the smallest model of this kind takes"):
        Adaptive()(spec, 0.5, "model", PLAIN, made_up(spec, 0), 100)


def test_a_shift_moves_budget_between_linears_of_a_block() -> None:
    linears = tuple(LinearSpec(f"layers.0.{name}_proj", 64, 64) for name in ("q", "k", "v", "o"))
    spec = ModelSpec("Any", 64, "float32", 4, 4 * 64 * 64, (BlockSpec("layers.0", 0, 4 * 64 * 64, linears),))
    spectra = Spectra({linear.name: np.exp(-0.05 * np.arange(64)) for linear in linears})
    plain = Adaptive(multiple_of=1)(spec, 0.6, "model", PLAIN, spectra)
    moved = Adaptive(multiple_of=1, shift=Shift(0.35))(spec, 0.6, "model", PLAIN, spectra)
    for name in ("q", "k"):
        assert (moved[f"layers.0.{name}_proj"] or 64) < (plain[f"layers.0.{name}_proj"] or 64)
    assert (moved["layers.0.v_proj"] or 64) > (plain["layers.0.v_proj"] or 64)
    assert moved.kept_params <= 0.6 * spec.params


def test_spectra_come_back_from_a_file_and_a_damaged_file_is_named(tmp_path) -> None:
    spec = drawn([[(64, 32)]])
    spectra, path = made_up(spec, 0), tmp_path / "spectra.safetensors"
    spectra.save(path)
    back = Spectra.load(path)
    assert (back.singular["layers.0.0"] == spectra.singular["layers.0.0"]).all()
    path.write_bytes(b"damaged")
    with pytest.raises(OutputError, match=r"spectra.safetensors is damaged.*makes it again"):
        Spectra.load(path)

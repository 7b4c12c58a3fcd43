"""What every allocator promises, on made-up models of any shape; then the published figures."""

import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PhiConfig

from lillama.errors import BudgetError
from lillama.model.describe import describe
from lillama.model.spec import BlockSpec, LinearSpec, ModelSpec
from lillama.ranks.adaptive import Allocator
from lillama.ranks.allocators import TOLERANCE, Bottom, Top, Uniform
from lillama.ranks.plan import RankPlan, Scope

ALLOCATORS: tuple[Allocator, ...] = (
    Uniform(),
    Uniform(multiple_of=1),
    Uniform(multiple_of=64),
    Bottom(min_rank=8, step=4),
    Bottom(min_rank=1, step=50),
    Top(min_rank=8, step=4),
    Top(min_rank=30, step=7),
)
every_allocator = pytest.mark.parametrize("allocate", ALLOCATORS, ids=repr)
shapes = st.integers(16, 400)


block_sketches = st.tuples(st.integers(0, 1000), st.lists(st.tuples(shapes, shapes), min_size=1, max_size=4))
sketches = st.tuples(st.integers(0, 50_000), st.lists(block_sketches, min_size=1, max_size=4))
Sketch = tuple[int, list[tuple[int, list[tuple[int, int]]]]]


def drawn(sketch: Sketch) -> ModelSpec:
    """Build a spec from parameters outside, and for each block other parameters and the shapes of its linears."""
    blocks = []
    for index, (others, pairs) in enumerate(sketch[1]):
        linears = tuple(LinearSpec(f"layers.{index}.{i}", *pair) for i, pair in enumerate(pairs))
        blocks.append(BlockSpec(f"layers.{index}", index, others + sum(x.params for x in linears), linears))
    return ModelSpec("Any", 16, "float32", 4, sketch[0] + sum(block.params for block in blocks), tuple(blocks))


keeps = st.floats(0.01, 1.0, allow_nan=False)
scopes = st.sampled_from(["model", "blocks"])
RELAXED = settings(max_examples=25, deadline=None)


def smallest_keep(refusal: BudgetError) -> float:
    found = re.search(r"smallest reachable keep is ([\d.]+) \(([\d.]+) % removed\)", str(refusal))
    assert found and "\n" not in str(refusal)
    return float(found[1])


def reached(allocate: Allocator, spec: ModelSpec, keep: float, scope: Scope) -> tuple[RankPlan, float]:
    """Return the plan for `keep`, or for the smallest reachable keep that the refusal names, and that keep."""
    try:
        return allocate(spec, keep, scope), keep
    except BudgetError as refusal:
        smallest = smallest_keep(refusal)
        assert smallest > keep
        return allocate(spec, smallest, scope), smallest


@every_allocator
@RELAXED
@given(sketch=sketches, keep=keeps, scope=scopes)
def test_the_budget_is_met_from_below_within_half_a_percent_or_one_rank(
    allocate: Allocator, sketch: Sketch, keep: float, scope: Scope
) -> None:
    spec = drawn(sketch)
    plan, keep = reached(allocate, spec, keep, scope)
    whole = spec.params if scope == "model" else spec.block_params
    coarsest = max(linear.out_features + linear.in_features for linear in spec.linears)
    shortfall = keep * whole - (plan.kept_params - (spec.params - whole))
    assert -1e-6 <= shortfall <= max(TOLERANCE * whole, coarsest) + 1
    assert set(plan.ranks) == {linear.name for linear in spec.linears}


@every_allocator
@RELAXED
@given(sketch=sketches, keep=keeps, scope=scopes)
def test_no_linear_is_stored_in_more_numbers_than_dense(
    allocate: Allocator, sketch: Sketch, keep: float, scope: Scope
) -> None:
    plan, _ = reached(allocate, drawn(sketch), keep, scope)
    for linear, rank in plan:
        assert rank is None or (rank >= 1 and linear.params_at(rank) < linear.params)
        if rank is not None:
            assert rank >= (allocate.multiple_of if isinstance(allocate, Uniform) else allocate.min_rank)


def test_uniform_ranks_are_multiples_where_the_budget_allows_it(made_up: Callable[..., ModelSpec]) -> None:
    spec = made_up(16, {"up": (512, 256), "down": (256, 512)})
    for multiple in (8, 16):
        plan = Uniform(multiple_of=multiple)(spec, 0.7)
        assert plan.factorised and all(rank % multiple == 0 for rank in plan.factorised.values())


def test_uniform_refines_its_multiple_on_a_small_model(made_up: Callable[..., ModelSpec]) -> None:
    spec = made_up(1, {"up": (300, 200)})
    plan = Uniform(multiple_of=64)(spec, 0.8)
    assert 0.8 - TOLERANCE <= plan.keep <= 0.8
    assert any(rank % 64 for rank in plan.factorised.values())


@every_allocator
@RELAXED
@given(sketch=sketches, low=keeps, high=keeps, scope=scopes)
def test_a_larger_keep_never_keeps_less(
    allocate: Allocator, sketch: Sketch, low: float, high: float, scope: Scope
) -> None:
    spec = drawn(sketch)
    smaller, low = reached(allocate, spec, min(low, high), scope)
    assert smaller.kept_params <= allocate(spec, max(low, high), scope).kept_params


@every_allocator
@RELAXED
@given(sketch=sketches, scope=scopes)
def test_keeping_all_leaves_all_dense(allocate: Allocator, sketch: Sketch, scope: Scope) -> None:
    spec = drawn(sketch)
    plan = allocate(spec, 1.0, scope)
    assert not plan.factorised and plan.kept_params == spec.params and plan.keep == 1


@every_allocator
@pytest.mark.parametrize("keep", [0.0, -0.1, 1.0001, float("nan")])
def test_a_keep_outside_its_range_is_refused(
    allocate: Allocator, keep: float, made_up: Callable[..., ModelSpec]
) -> None:
    with pytest.raises(BudgetError, match="above 0 and at most 1"):
        allocate(made_up(2, {"up": (300, 200)}), keep)


@pytest.mark.parametrize("kept", [29, 57, 58, 30])
def test_the_named_keep_is_reachable_where_its_product_rounds_down(kept: int) -> None:
    """As `int(0.29 * 100)` is 28, a floor of 29 parameters in 100 is not reached with 0.29."""
    linear = LinearSpec("layers.0.up", 2, kept - 2)
    whole = 100 * linear.params_at(1) // kept
    spec = ModelSpec("Any", 4, "float32", 4, whole, (BlockSpec("layers.0", 0, whole, (linear,)),))
    smallest = RankPlan(spec, {linear.name: 1}).kept_params
    with pytest.raises(BudgetError) as refusal:
        Uniform(multiple_of=1)(spec, 1e-6)
    assert Uniform(multiple_of=1)(spec, smallest_keep(refusal.value)).kept_params == smallest


def test_scope_blocks_leaves_what_lies_outside_out_of_the_account(made_up: Callable[..., ModelSpec]) -> None:
    shape = {"up": (300, 200), "down": (200, 300)}
    small, large = made_up(4, shape, others=500, outside=0), made_up(4, shape, others=500, outside=10**6)
    for allocate in ALLOCATORS:
        assert allocate(small, 0.6, "blocks").ranks == allocate(large, 0.6, "blocks").ranks
        assert allocate(small, 0.6, "blocks").ranks == allocate(small, 0.6, "model").ranks


def test_uniform_gives_equal_linears_equal_shares(made_up: Callable[..., ModelSpec]) -> None:
    plan = Uniform()(made_up(8, {"up": (704, 256), "q": (256, 256)}), 0.5)
    for name in ("up", "q"):
        ranks = {plan[f"layers.{i}.{name}"] for i in range(8)}
        assert max(ranks) - min(ranks) in (0, 8)
    share = plan["layers.7.up"] / LinearSpec("", 704, 256).break_even_rank
    assert share == pytest.approx(plan["layers.7.q"] / 128, abs=8 / 128)


@pytest.mark.parametrize("allocate", [Bottom(min_rank=16, step=4), Top(min_rank=16, step=4)], ids=repr)
@pytest.mark.parametrize("keep", [0.95, 0.8, 0.5])
def test_bottom_and_top_exhaust_block_after_block(
    allocate: Bottom | Top, keep: float, made_up: Callable[..., ModelSpec]
) -> None:
    spec = made_up(6, {"up": (300, 200), "down": (200, 300)}, outside=20_000)
    plan = allocate(spec, keep)
    order = spec.blocks if isinstance(allocate, Bottom) else spec.blocks[::-1]
    ranks = [plan[linear.name] for block in order for linear in block.linears]
    touched = [rank for rank in ranks if rank is not None]
    assert touched and ranks == touched + [None] * (len(ranks) - len(touched))
    assert all(rank == 16 for rank in touched[:-1]) and touched[-1] >= 16


def test_linears_that_break_even_at_the_smallest_rank_stay_dense(made_up: Callable[..., ModelSpec]) -> None:
    plan = Bottom(min_rank=16, step=4)(made_up(3, {"k": (32, 32), "up": (300, 200)}), 0.5)
    assert {plan[f"layers.{i}.k"] for i in range(3)} == {None}


def test_phi_2_at_sixty_percent_is_refused_as_the_published_rule_cannot_reach_it() -> None:
    config = PhiConfig(
        vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32,
        architectures=["PhiForCausalLM"],
    )  # fmt: skip
    spec = describe(config)
    assert spec.params == 2_779_683_840
    for allocate in (Bottom(), Top()):
        with pytest.raises(BudgetError, match=r"smallest reachable keep is 0\.63\d\d \(36\.2 % removed\)") as refusal:
            allocate(spec, 0.6)
        assert allocate(spec, smallest_keep(refusal.value)).keep < 0.6385


def test_mixtral_at_eighty_percent_touches_blocks_0_to_8_and_a_part_of_9(made_up: Callable[..., ModelSpec]) -> None:
    experts = {
        f"experts.{e}.{name}": shape
        for e in range(8)
        for name, shape in {"w1": (14336, 4096), "w2": (4096, 14336), "w3": (14336, 4096)}.items()
    }
    attention = 2 * 4096 * 4096 + 2 * 1024 * 4096
    spec = made_up(32, experts, others=attention + 8 * 4096 + 2 * 4096, outside=2 * 32000 * 4096 + 4096)
    assert spec.params == 46_702_792_704
    plan = Bottom()(spec, 0.8)
    touched = [len(plan.ranks_within(block)) for block in spec]
    assert touched[:9] == [24] * 9 and 0 < touched[9] < 24 and set(touched[10:]) == {0}
    assert spec.params - plan.kept_params == pytest.approx(9.34e9, rel=1e-3)
    assert {rank for block in spec.blocks[:9] for rank in plan.ranks_within(block).values()} == {1024}

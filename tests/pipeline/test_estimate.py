from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lillama.lowrank.initialisers import Svd, TwoSided, Whitened
from lillama.model.spec import BlockSpec, FfnSpec, LinearSpec, ModelSpec
from lillama.moments.gradients import PROBED_TOKENS
from lillama.pipeline.estimate import EFFICIENCY, estimate, matmul_rate
from lillama.ranks.adaptive import Adaptive
from lillama.ranks.allocators import Uniform
from lillama.ranks.plan import RankPlan
from lillama.recipes.recipe import Recipe
from lillama.stream.head import LOGITS
from lillama.system.memory import LOGIT_BYTES_IN_TRAINING, MemoryBudget

Plan = Callable[..., RankPlan]


@pytest.fixture
def plan() -> Plan:
    """Make a plan for blocks of two linears, `up` (3w x w) and `down` (w x 3w), and w other parameters."""

    def make(
        width: int = 64, blocks: int = 3, rank: int | None = 10, factorised: tuple[int, ...] | None = None
    ) -> RankPlan:
        made = tuple(
            BlockSpec(
                f"layers.{i}",
                i,
                6 * width**2 + width,
                (LinearSpec(f"layers.{i}.up", 3 * width, width), LinearSpec(f"layers.{i}.down", width, 3 * width)),
            )
            for i in range(blocks)
        )
        spec = ModelSpec("Any", width, "bfloat16", 2, sum(block.params for block in made) + 1000, made)
        chosen = range(blocks) if factorised is None else factorised
        return RankPlan(
            spec, {x.name: rank if block.index in chosen else None for block in made for x in block.linears}
        )

    return make


def recipe(stream: str = "both", epochs: int = 4, schedule: str = "sequential", gram: bool = False) -> Recipe:
    """A recipe over 1000 tokens, with ranks from shapes alone and no recovery."""
    base = Recipe()
    return replace(
        base,
        ranks=Uniform(),
        recover=replace(base.recover, epochs=0),
        init=Whitened() if gram else Svd(),
        distill=replace(base.distill, stream=stream, epochs=epochs, schedule=schedule),
        calibration=replace(base.calibration, tokens=1000, seq_len=50),
    )


def test_operations_are_those_counted_by_hand(plan: Plan) -> None:
    dense, kept, factors = 6 * 64**2 + 64, 10 * 2 * 4 * 64 + 64, 2 * 64**2 * (44 * 64 + 8 * 192)
    one = estimate(plan(blocks=1), recipe("teacher", epochs=1), 4, 2)
    assert one.flops == 1000 * (2 * dense + 3 * 2 * kept) + factors  # the teacher; forward and twice as much backward
    both = estimate(plan(blocks=1), recipe("both", epochs=4), 4, 2)
    assert both.flops == 1000 * (2 * dense + 2 * kept + 4 * 2 * 3 * 2 * kept) + factors  # and the student's stream
    whitened = estimate(plan(blocks=1), recipe("teacher", epochs=1, gram=True), 4, 2)
    assert whitened.flops - one.flops == 1000 * 2 * (64**2 + 192**2)
    wide = [estimate(plan(512, blocks=1), recipe("teacher", epochs=1, gram=gram), 4, 2).flops for gram in (True, False)]
    assert wide[0] - wide[1] == 1000 * (512 * (512 + 256) + 1536 * (1536 + 256))  # tiles above the diagonal alone


DENSE, KEPT, HEAD = 6 * 64**2 + 64, 10 * 2 * 4 * 64 + 64, 1000  # of a block, of its student, outside the blocks
SQUARES = 64**2 + 192**2  # of the widths at one side of a block's linears
FACTORS = 2 * 64**2 * (44 * 64 + 8 * 192)  # of a block


@pytest.mark.parametrize("tokens", [1000, 10**6])
def test_gradients_of_a_few_tokens_and_their_grams_are_counted(plan: Plan, tokens: int) -> None:
    base = recipe("teacher", epochs=1, gram=True)
    base = replace(base, calibration=replace(base.calibration, tokens=tokens))
    plain, both = (estimate(plan(blocks=1), replace(base, init=init), 4, 2) for init in (Whitened(), TwoSided()))
    probed = min(tokens, PROBED_TOKENS)
    assert both.memory_bytes - plain.memory_bytes == 8 * SQUARES
    assert both.flops - plain.flops == probed * (10 * DENSE + 4 * HEAD + 4 * SQUARES)
    stores = max(2 * tokens + probed, 3 * probed)  # teaching, or the pass back before it
    assert both.activation_bytes == stores * 64 * 4 and plain.activation_bytes == 2 * tokens * 64 * 4


@pytest.mark.parametrize("free", [0, 10**9])
def test_spectra_and_the_comparison_of_rank_plans_are_counted(plan: Plan, free: int) -> None:
    """Two plans in all: the original and two students run over the 100 tokens held out, the original over 1000 others."""
    base = recipe("teacher", epochs=1, gram=True)
    base = replace(base, init=TwoSided(), distill=replace(base.distill, held_out=0.1))
    adaptive = replace(base, ranks=Adaptive(mix=(0.5,)))
    even, chosen = (estimate(plan(blocks=3), one, 4, 2, memory=MemoryBudget(free, free)) for one in (base, adaptive))
    spectra = 1000 * 3 * 4 * SQUARES + 3 * FACTORS
    passed = 1000 * 3 * 2 * DENSE + 100 * 3 * 2 * (DENSE + 2 * KEPT) + 100 * 3 * 2 * 2 * HEAD + 3 * FACTORS
    moments = 1000 * 3 * (4 * DENSE + 4 * SQUARES)  # once more for the plans, or once for all
    assert chosen.flops - even.flops == spectra + passed + (-moments if free else moments)
    assert estimate(plan(), adaptive, 4, 2, open_ranks=False) == estimate(plan(), base, 4, 2)


def test_the_widths_of_ffns_are_counted_with_the_plan_that_uses_them(plan: Plan) -> None:
    base = recipe("teacher", epochs=1)
    base = replace(base, distill=replace(base.distill, held_out=0.1))
    narrow, ranks = (replace(base, ranks=Adaptive(mix=(0.5,), narrow=narrow)) for narrow in (True, False))
    whole = plan(blocks=3)
    up, down = "layers.0.up", "layers.0.down"  # of the names of the spec's linears none is looked at
    ffns = (FfnSpec((up,), down, 192),)
    spec = replace(whole.spec, blocks=tuple(replace(block, ffns=ffns) for block in whole.spec.blocks))
    found, without = (estimate(replace(whole, spec=spec), one, 4, 2) for one in (narrow, ranks))
    assert found.flops - without.flops == 3 * 16 * 192**3 + 100 * (3 * 2 * KEPT + 4 * HEAD)
    assert estimate(whole, narrow, 4, 2) == estimate(whole, ranks, 4, 2)  # there is none


def test_many_plans_over_many_held_out_tokens_are_the_most_activations_there_are(plan: Plan) -> None:
    base = recipe("teacher")
    base = replace(base, ranks=Adaptive(mix=(0.2, 0.4, 0.6)), distill=replace(base.distill, held_out=0.5))
    assert estimate(plan(), base, 4, 2).activation_bytes == (4 * 1000 + 5 * 500) * 64 * 4


@pytest.mark.parametrize(("factorised", "chain"), [((0, 1, 2), 3), ((1,), 2)])
def test_the_recovery_tail_is_counted_from_the_first_trained_block_to_the_head(
    plan: Plan, factorised: tuple[int, ...], chain: int
) -> None:
    base = recipe("teacher", epochs=1)
    base = replace(base, distill=replace(base.distill, held_out=0.1, blocks="all"))
    tail = replace(base, recover=replace(base.recover, epochs=2, checks=4, batch_size=3))
    made = plan(factorised=factorised)
    without, found = estimate(made, base, 4, 2), estimate(made, tail, 4, 2)
    trained, dense = len(factorised), chain - len(factorised)
    forth, back = 2 * (trained * KEPT + dense * DENSE), 4 * trained * KEPT + 2 * dense * DENSE
    steps, checks = 2 * 900 * (2 * forth + back + 6 * HEAD), 5 * 100 * (forth + 4 * HEAD)
    assert found.flops - without.flops == 1000 * 2 * 3 * DENSE + steps + checks
    assert found.activation_bytes == (2 * 1000 + chain * 3 * 50) * 64 * 4
    assert found.disk_bytes - without.disk_bytes == (48 * trained - 32) * KEPT  # snapshots of a block are gone by then
    assert found.memory_bytes - without.memory_bytes == HEAD * 4 + LOGITS * 50 * (HEAD // 64) * 4


def test_logits_take_no_more_memory_than_they_are_cut_to(plan: Plan) -> None:
    base = recipe()
    base = replace(base, recover=replace(base.recover, epochs=1), calibration=replace(base.calibration, seq_len=10**7))
    small = plan()
    large = replace(small, spec=replace(small.spec, params=small.spec.params + 10**6))
    assert 4 * 10**7 * (HEAD // 64) > LOGIT_BYTES_IN_TRAINING
    assert estimate(large, base, 4, 2).memory_bytes - estimate(small, base, 4, 2).memory_bytes == 4 * 10**6


def test_what_the_objective_adds_is_counted(plan: Plan) -> None:
    base, dense = recipe("student", epochs=2), 6 * 64**2 + 64
    plain = estimate(plan(), base, 4, 2)
    ahead, adaptive, parts = (
        estimate(plan(), replace(base, distill=replace(base.distill, **change)), 4, 2)
        for change in ({"look_ahead": 0.3}, {"adaptive": 0.5}, {"sub_blocks": 0.3})
    )
    store = 1000 * 64 * 4
    assert ahead.memory_bytes - plain.memory_bytes == 4 * dense
    assert ahead.flops - plain.flops == 1000 * 3 * 2 * 4 * dense
    assert adaptive.flops - plain.flops == 1000 * 3 * 2 * dense
    assert [x.activation_bytes - plain.activation_bytes for x in (ahead, adaptive, parts)] == [store, store, 2 * store]


def test_blocks_above_the_last_one_do_not_run_and_dense_ones_below_do(plan: Plan) -> None:
    wanted = recipe("teacher")
    first, last = (estimate(plan(factorised=(i,)), wanted, 4, 2).flops for i in (0, 2))
    assert last - first == 1000 * 2 * 2 * (6 * 64**2 + 64)
    assert first == estimate(plan(blocks=1), wanted, 4, 2).flops


def test_memory_grows_with_the_block_and_not_with_the_depth(plan: Plan) -> None:
    small, wide, deep = (
        estimate(plan(width, blocks), recipe(), 4, 2) for width, blocks in ((64, 3), (128, 3), (64, 30))
    )
    assert wide.memory_bytes > small.memory_bytes == deep.memory_bytes
    assert deep.disk_bytes > small.disk_bytes and deep.activation_bytes == small.activation_bytes


def test_memory_holds_the_teacher_with_its_grams_and_the_student_with_its_moments(plan: Plan) -> None:
    found = estimate(plan(), recipe(), 4, 1).memory_bytes
    assert found > 4 * DENSE + 8 * SQUARES and found > 16 * KEPT
    assert estimate(plan(), recipe(), 4, 8).memory_bytes > found > estimate(plan(), recipe(), 2, 1).memory_bytes


def test_a_joint_schedule_holds_all_blocks(plan: Plan) -> None:
    one, all_blocks = (estimate(plan(), recipe(schedule=s), 4, 2).memory_bytes for s in ("sequential", "joint"))
    assert all_blocks == 3 * one


@pytest.mark.parametrize(("stream", "schedule", "stores"), [
    ("teacher", "sequential", 2), ("both", "sequential", 3), ("student", "sequential", 3), ("both", "joint", 2),
])  # fmt: skip
def test_activations_are_one_store_for_each_stream_and_one_for_the_target(
    stream: str, schedule: str, stores: int, plan: Plan
) -> None:
    assert estimate(plan(), recipe(stream, schedule=schedule), 4, 2).activation_bytes == stores * 1000 * 64 * 4


def test_disk_holds_the_result_the_finished_blocks_and_snapshots_of_one(plan: Plan) -> None:
    made, block = plan(), 10 * 2 * 4 * 64 + 64
    assert estimate(made, recipe(), 4, 2).disk_bytes == made.kept_bytes + 4 * 3 * block + 2 * 16 * block  # in fp32


def test_a_plan_that_changes_nothing_costs_nothing(plan: Plan) -> None:
    for wanted in (recipe(), Recipe()):
        found = estimate(plan(rank=None), wanted, 4, 2, rate=1.0)
        assert found.flops == 0 and found.memory_bytes == 0 and found.seconds == 0


def test_seconds_follow_from_the_measured_rate(plan: Plan) -> None:
    assert estimate(plan(), recipe(), 4, 2).seconds is None
    found = estimate(plan(), recipe(), 4, 2, rate=1e9)
    assert found.seconds == pytest.approx(found.flops / (EFFICIENCY * 1e9))
    assert matmul_rate(torch.device("cpu"), torch.float32) > 1e8


def test_an_expert_costs_what_the_tokens_cost_that_come_to_it(plan: Plan) -> None:
    """Blocks whose linears are those of an expert that sees a quarter of the tokens."""
    whole = plan(blocks=1)
    (block,) = whole.spec.blocks
    quarter = replace(block, linears=tuple(replace(linear, share=0.25) for linear in block.linears))
    routed = replace(whole, spec=replace(whole.spec, blocks=(quarter,)))
    every, some = (estimate(one, recipe("teacher", epochs=1, gram=True), 4, 2) for one in (whole, routed))
    other, grams = 64, 2 * (64**2 + 192**2)
    fed = (every.flops - FACTORS) / 1000 - 8 * other  # forward of the teacher, three times the student's
    assert fed == 2 * 6 * 64**2 + 6 * 10 * 2 * 4 * 64 + grams
    assert (some.flops - FACTORS) / 1000 - 8 * other == fed / 4
    assert some.memory_bytes < every.memory_bytes and some.disk_bytes == every.disk_bytes


def test_blocks_that_recovery_reaches_are_not_taught_by_themselves(plan: Plan) -> None:
    base = recipe("teacher", epochs=3)
    tail = replace(base, recover=replace(base.recover, epochs=1))
    taught = replace(tail, distill=replace(tail.distill, blocks="all"))
    local = 3 * 1000 * 6 * 3 * KEPT
    assert estimate(plan(), taught, 4, 2).flops - estimate(plan(), tail, 4, 2).flops == local
    assert replace(base, distill=replace(base.distill, blocks="all")).distill_in(last_stack=True) == taught.distill
    assert tail.distill_in(last_stack=True).epochs == 0 and tail.distill_in(last_stack=False) == tail.distill
    routers = replace(tail, recover=replace(tail.recover, trains="routers"))
    assert routers.distill_in(last_stack=True).epochs == 3

"""Widths of FFNs beside ranks: chosen where they lose less, within the budget, and kept in the files."""

from itertools import product

import numpy as np
import pytest

from lillama.lowrank.storage import Storage
from lillama.model.spec import BlockSpec, FfnSpec, LinearSpec, ModelSpec
from lillama.ranks.adaptive import Adaptive, Shift
from lillama.ranks.plan import RankPlan
from lillama.ranks.spectra import Spectra
from lillama.ranks.widths import WidthCurve

PLAIN, PIVOT = Storage("plain"), Storage("pivot")
HIDDEN, NEURONS, STEP = 24, 64, 8


def made(blocks: int = 2, biases: int = 0) -> ModelSpec:
    """A model of blocks with queries and an FFN."""
    found = []
    for index in range(blocks):
        name = f"layers.{index}"
        shapes = {"q": (HIDDEN, HIDDEN), "up": (NEURONS, HIDDEN), "down": (HIDDEN, NEURONS)}
        linears = tuple(LinearSpec(f"{name}.{leaf}", *shape) for leaf, shape in shapes.items())
        ffn = FfnSpec((f"{name}.up",), f"{name}.down", NEURONS, biases)
        found.append(BlockSpec(name, index, sum(x.params for x in linears) + biases * NEURONS, linears, (ffn,)))
    return ModelSpec("Any", HIDDEN, "bfloat16", 2, sum(block.params for block in found), tuple(found))


def measured(spec: ModelSpec, cheap: float = 1.0) -> Spectra:
    """Flat spectra, in which ranks are dear; of a curve in which neurons cost `cheap`."""
    rng = np.random.default_rng(0)
    singular = {linear.name: np.full(min(linear.out_features, linear.in_features), 1.0) for linear in spec.linears}
    rises = np.concatenate(([0.0], np.cumsum(cheap * (1 + np.arange(6)) ** 2)))
    curves = {ffn.outward: WidthCurve(rng.permutation(NEURONS)[: 6 * STEP], rises, NEURONS) for ffn in spec.ffns}
    return Spectra(singular, curves)


def test_neurons_go_where_they_are_missed_least() -> None:
    spec = made()
    cheap, dear = measured(spec, 0.01), measured(spec, 1e6)
    narrow = Adaptive(multiple_of=1)(spec, 0.7, "model", PIVOT, cheap)
    assert set(narrow.widths) == {"layers.0.down", "layers.1.down"} and narrow.keep <= 0.7
    assert all(narrow[name] is None for ffn in spec.ffns for name in ffn.linears)
    assert not Adaptive(multiple_of=1)(spec, 0.7, "model", PIVOT, dear).widths
    assert not Adaptive(multiple_of=1, narrow=False)(spec, 0.7, "model", PIVOT, cheap).widths


def test_no_other_plan_of_the_budget_is_predicted_to_be_better() -> None:
    """Of one block all plans of ranks and widths; what the price leaves over is less than a step of width."""
    spec = made(blocks=1)
    spectra = measured(spec, 0.02)
    chosen = Adaptive(multiple_of=1, floor=0.0)(spec, 0.6, "model", PLAIN, spectra)
    curve, best = spectra.widths["layers.0.down"], np.inf
    most = int(0.6 * spec.params)
    for width, rank in product(curve.widths[1:], [*range(1, HIDDEN), None]):
        ranks = {"layers.0.q": rank, "layers.0.up": None, "layers.0.down": None}
        plan = RankPlan(spec, ranks, PLAIN, {"layers.0.down": int(width)})
        if plan.kept_params <= most - STEP * 2 * HIDDEN:
            best = min(best, spectra.rise(plan))
    assert chosen.kept_params <= most and spectra.rise(chosen) <= best


def test_the_plan_with_widths_is_one_more_candidate() -> None:
    spec = made()
    found = Adaptive(multiple_of=1).candidates(spec, 0.7, "model", PIVOT, measured(spec, 0.01))
    assert [(share, bool(plan.widths)) for share, plan in found] == [
        (0.0, False), (0.5, False), (1.0, False), (1.0, True),
    ]  # fmt: skip
    found = Adaptive(multiple_of=1).candidates(spec, 0.7, "model", PIVOT, measured(spec, 1e6))
    assert [share for share, _ in found] == [0.0, 0.5, 1.0]


def test_bits_change_no_choice_between_ranks_and_widths() -> None:
    """A narrower linear has the same bits as factors have."""
    spec, eight = made(), Storage("pivot", bits=8)
    spectra = measured(spec, 0.01)
    plans = [Adaptive(multiple_of=1)(spec, 0.7, "model", storage, spectra) for storage in (eight, Storage("pivot"))]
    assert plans[0].widths == plans[1].widths != {} and plans[0].kept_bytes < 0.6 * plans[1].kept_bytes
    most = int(0.5 * spec.nbytes)
    plan = Adaptive(multiple_of=1)(spec, 0.7, "model", eight, spectra, most)
    assert plan.kept_bytes <= most


def test_a_shift_passes_narrower_linears_by() -> None:
    spec, shift = made(), Shift(0.2, ("*q",), ("*up",))
    plan = Adaptive(multiple_of=1, shift=shift)(spec, 0.7, "model", PIVOT, measured(spec, 0.01))
    assert plan.widths and all(plan[name] is None for ffn in spec.ffns for name in ffn.linears)


def test_the_account_of_a_narrower_ffn() -> None:
    spec = made(biases=1)
    plan = RankPlan(spec, dict.fromkeys(linear.name for linear in spec.linears), widths={"layers.1.down": 40})
    assert plan.shapes == {"layers.1.up": (40, HIDDEN), "layers.1.down": (HIDDEN, 40)}
    gone = (NEURONS - 40) * (2 * HIDDEN + 1)
    assert spec.params - plan.kept_params == gone and spec.nbytes - plan.kept_bytes == 2 * gone
    assert [plan.changes(block) for block in spec] == [False, True] and plan.compresses and not plan.factorised
    assert plan.widths_within(spec.blocks[1]) == {"down": 40}


def test_widths_come_back_from_files(tmp_path) -> None:
    spec = made()
    spectra = measured(spec, 0.01)
    spectra.save(tmp_path / "spectra.safetensors")
    again = Spectra.load(tmp_path / "spectra.safetensors")
    assert again.singular.keys() == spectra.singular.keys()
    for name, curve in spectra.widths.items():
        assert np.array_equal(again.widths[name].order, curve.order)
        assert np.array_equal(again.widths[name].rises, curve.rises) and again.widths[name].neurons == NEURONS
    plan = Adaptive(multiple_of=1)(spec, 0.7, "model", PIVOT, spectra)
    plan.save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json", spec, PIVOT) == plan


@pytest.mark.parametrize(("width", "rise"), [(64, 0.0), (63, 1.0), (56, 1.0), (55, 5.0), (16, 91.0), (3, 91.0)])
def test_a_width_between_steps_loses_what_the_next_step_does(width: int, rise: float) -> None:
    curve = measured(made()).widths["layers.0.down"]
    assert curve.rise(width) == rise and len(curve.kept(width)) == width
    assert set(curve.kept(max(width, 16))).isdisjoint(curve.order[: NEURONS - max(width, 16)])

"""Bits in the place of ranks: within the bytes, never worse than one width for all, and what is refused."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lillama.errors import BudgetError, RecipeError
from lillama.lowrank.storage import BITS, Storage
from lillama.model.spec import BlockSpec, LinearSpec, ModelSpec
from lillama.ranks.bits import MixedBits
from lillama.ranks.plan import RankPlan
from lillama.ranks.spectra import Spectra

PLAIN = Storage("plain")
sketches = st.lists(st.sampled_from([(8, 16), (64, 48), (40, 130), (256, 64)]), min_size=1, max_size=8)


def made(shapes: list[tuple[int, int]]) -> ModelSpec:
    linears = tuple(LinearSpec(f"layers.0.{index}", *shape) for index, shape in enumerate(shapes))
    params = sum(linear.params for linear in linears)
    return ModelSpec("Any", 16, "bfloat16", 2, params + 100, (BlockSpec("layers.0", 0, params, linears),))


def measured(spec: ModelSpec, seed: int) -> Spectra:
    """A rise that falls to about a quarter with each bit, from linear to linear of another size."""
    rng = np.random.default_rng(seed)
    rises = {
        one.name: rng.lognormal(sigma=2) * 0.25 ** np.array(BITS) * rng.uniform(0.7, 1.3, 6) for one in spec.linears
    }
    return Spectra({}, rounding={name: np.sort(values)[::-1].copy() for name, values in rises.items()})


def even(spec: ModelSpec, bits: int) -> RankPlan:
    names = [linear.name for linear in spec.linears]
    return RankPlan(spec, dict.fromkeys(names), PLAIN, bits=dict.fromkeys(names, bits))


@settings(max_examples=60, deadline=None)
@given(sketches, st.integers(0, 99), st.floats(0.2, 1.1))
def test_a_plan_meets_its_bytes_and_is_no_worse_than_one_width(shapes, seed: int, share: float) -> None:
    spec = made(shapes)
    spectra, most = measured(spec, seed), int(share * spec.nbytes)
    if even(spec, 2).kept_bytes > most:
        with pytest.raises(BudgetError, match="with 2 bits in every linear"):
            MixedBits()(spec, 1.0, storage=PLAIN, spectra=spectra, nbytes=most)
        return
    plan = MixedBits()(spec, 1.0, storage=PLAIN, spectra=spectra, nbytes=most)
    assert plan.kept_bytes <= most and plan.kept_params == spec.params and not plan.reduces
    fitting = [even(spec, bits) for bits in BITS if even(spec, bits).kept_bytes <= most]
    assert spectra.rise(plan) <= min(map(spectra.rise, fitting)) * (1 + 1e-12)
    outline = MixedBits()(spec, 1.0, storage=PLAIN, nbytes=most)
    assert outline.kept_bytes <= most and len(set(outline.bits.values())) <= 1


def test_more_bytes_never_mean_a_larger_rise() -> None:
    spec = made([(64, 48), (256, 64), (40, 130)] * 20)
    spectra = measured(spec, 3)
    rises = [
        spectra.rise(MixedBits()(spec, 1.0, storage=PLAIN, spectra=spectra, nbytes=int(share * spec.nbytes)))
        for share in np.linspace(0.2, 1.0, 30)
    ]
    assert all(later <= earlier * (1 + 1e-3) for earlier, later in pairwise(rises))
    assert rises[-1] == 0


def test_the_widths_of_the_recipe_bound_the_choice() -> None:
    spec = made([(64, 48)] * 10)
    plan = MixedBits(widths=(4, 8))(spec, 1.0, storage=PLAIN, spectra=measured(spec, 0), nbytes=int(0.4 * spec.nbytes))
    assert set(plan.bits.values()) == {4, 8}
    with pytest.raises(BudgetError, match="with 4 bits in every linear"):
        MixedBits(widths=(8, 4))(spec, 1.0, storage=PLAIN, nbytes=int(0.2 * spec.nbytes))


def test_a_size_in_bytes_is_asked_for() -> None:
    with pytest.raises(RecipeError, match="--bytes"):
        MixedBits()(made([(64, 48)]), 0.8)


def test_thousands_of_linears_leave_nothing_over() -> None:
    spec = made([(64, 48)] * 30_000)
    spectra = measured(spec, 0)
    plan = MixedBits()(spec, 1.0, storage=PLAIN, spectra=spectra, nbytes=int(0.25 * spec.nbytes))
    assert 0.249 * spec.nbytes < plan.kept_bytes <= 0.25 * spec.nbytes


def test_a_plan_of_bits_is_read_back(tmp_path) -> None:
    spec = made([(64, 48), (256, 64)])
    plan = MixedBits()(spec, 1.0, storage=PLAIN, spectra=measured(spec, 0), nbytes=int(0.3 * spec.nbytes))
    plan.save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json", spec, PLAIN) == plan
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace(f'"bits": {plan.bits["layers.0.0"]}', '"bits": 7', 1))
    with pytest.raises(RecipeError, match=r"linear layers\.0\.\d: bits 7 are none of 2, 3, 4, 5, 6, 8"):
        RankPlan.load(tmp_path / "plan.json", spec, PLAIN)


def test_spectra_with_what_bits_lose_are_read_back(tmp_path) -> None:
    spectra = measured(made([(64, 48), (8, 16)]), 1)
    spectra.save(tmp_path / "spectra.safetensors")
    found = Spectra.load(tmp_path / "spectra.safetensors")
    assert not found.singular and found.rounding.keys() == spectra.rounding.keys()
    assert all((found.rounding[name] == values).all() for name, values in spectra.rounding.items())

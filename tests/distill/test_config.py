import math
from dataclasses import replace

import pytest

from lillama.distill.config import DistillConfig
from lillama.errors import RecipeError
from lillama.recipes.recipe import load_recipe

PLAIN = DistillConfig(lr_scale="width", lr_schedule="constant", warmup=0.0)


def factors(steps: int, **changes: object) -> list[float]:
    optim = replace(PLAIN, **changes).optim
    return [optim.lr_factor(step, steps) for step in range(steps)]


def test_constant():
    assert factors(5) == [1, 1, 1, 1, 1]


def test_cosine_falls_from_one_towards_zero():
    rates = factors(4, lr_schedule="cosine")
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])


def test_warm_up_rises_linearly_then_the_schedule_begins():
    assert factors(10, warmup=0.4)[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    rates = factors(10, warmup=0.4, lr_schedule="cosine")
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rates[5:] == sorted(rates[5:], reverse=True) and 0 < rates[-1] < 0.1


def test_the_shortest_warm_up_is_one_step():
    assert factors(3, warmup=0.01) == [1, 1, 1]


def test_rate_by_width():
    assert replace(PLAIN, lr=1e-3, lr_width=256).optim.peak_lr(1024) == pytest.approx(2.5e-4)
    assert replace(PLAIN, lr=1e-3, lr_width=None).optim.peak_lr(1024) == 1e-3
    assert replace(PLAIN, lr=1e-3, lr_scale="rms").optim.peak_lr(1024) == 1e-3


@pytest.mark.parametrize("key", ["look_ahead", "sub_blocks"])
def test_the_joint_schedule_has_no_more_than_the_blocks_outputs(key):
    with pytest.raises(RecipeError, match=rf"distill\.{key} is 0\.5.*joint.*sequential"):
        DistillConfig(schedule="joint", **{key: 0.5})
    with pytest.raises(RecipeError, match=key):
        load_recipe("paper", {"distill": {"schedule": "joint", key: 0.5}})


def test_a_target_adapts_to_a_students_stream_only():
    with pytest.raises(RecipeError, match=r"distill\.adaptive is 1.*stream"):
        DistillConfig(stream="teacher", adaptive=1.0)

"""Which state of a recovery tail is kept, and when it ends."""

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from lillama.distill.recover import HeldOut, RecoverConfig, RecoverTrace

START = HeldOut(kl=0.5, lm=3.0, norm=0.9)


def traced(*found: HeldOut, lm: float = 0.0) -> RecoverTrace:
    trace = RecoverTrace(lm)
    for step, held_out in enumerate([START, *found]):
        if step:
            trace.losses.append(torch.tensor([0.5, 3.0]))
        trace.check(step, held_out, lambda step=step: {0: {"step": torch.tensor(step)}})
    return trace


def kept(trace: RecoverTrace) -> int:
    step = trace.checks[trace.best][0]
    assert (trace.best_states[0]["step"].item() if trace.best_states else 0) == step
    return step


def test_the_smallest_held_out_loss_is_kept():
    assert kept(traced(HeldOut(0.4, 3, 0.9), HeldOut(0.3, 3, 0.9), HeldOut(0.35, 3, 0.9))) == 2
    assert kept(traced(HeldOut(0.6, 2, 0.9), HeldOut(0.5, 1, 0.9))) == 0  # a tie keeps the start
    assert kept(traced(HeldOut(0.6, 2.9, 0.9), lm=1.0)) == 1
    assert kept(traced(HeldOut(0.6, 2.9, 0.9), lm=0.1)) == 0


def test_a_state_that_is_not_finite_or_whose_activations_grew_is_not_kept():
    assert kept(traced(HeldOut(math.nan, 3, 0.9), HeldOut(0.1, math.inf, 0.9))) == 0
    assert kept(traced(HeldOut(0.1, 3, 1.5), HeldOut(0.1, 3, 0.5), HeldOut(0.4, 3, 1.3))) == 3


def test_training_ends_where_it_brings_nothing():
    better, worse = HeldOut(0.4, 3, 0.9), HeldOut(0.6, 3, 0.9)
    assert not traced(worse, worse, worse).reason_to_stop(2)  # the rate has yet to fall
    assert not traced(better, worse).reason_to_stop(2)
    assert traced(better, worse, worse).reason_to_stop(2) == "no progress"
    assert traced(better, HeldOut(0.8, 3, 0.9)).reason_to_stop(2) == "diverged"
    assert traced(HeldOut(math.nan, 3, 0.9)).reason_to_stop(2) == "not finite"
    bad = traced(better)
    bad.losses.append(torch.tensor([math.nan, 3.0]))
    assert bad.reason_to_stop(2) == "not finite"


def test_a_trace_goes_through_a_file():
    trace = traced(HeldOut(0.1 + 0.2, 3, 0.9), HeldOut(0.35, 3, 0.9))
    again = RecoverTrace.from_json(0.0, trace.as_json(), trace.best_states)
    assert again.log(1e-3, 1.0) == trace.log(1e-3, 1.0)
    assert again.log(1e-3, 1.0).improved and again.log(1e-3, 1.0).best_step == 1


def test_the_log_is_valid_json_whatever_happened():
    trace = traced(HeldOut(math.nan, 3, 0.9))
    trace.losses.append(torch.tensor([math.nan, math.nan]))
    log = trace.log(1e-3, 1.0)
    assert len(log.curve) == 1 and len(log.held_out) == 1 and log.final == START


@pytest.mark.parametrize("steps", [1, 3, 8, 61])
def test_the_last_step_is_checked(steps):
    checks = RecoverConfig(checks=8).check_steps(steps)
    assert max(checks) == steps and min(checks) >= 1 and len(checks) == min(steps, 8)


def test_the_configuration_refuses_nonsense():
    adapter = TypeAdapter(RecoverConfig)
    assert adapter.validate_python({"epochs": 0}) == RecoverConfig(epochs=0)
    for wrong in ({"epoch": 1}, {"lm": 1.1}, {"lr": 0}, {"epochs": -1}, {"checks": 0}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)

"""Which state of a recovery is kept, and when it goes back."""

import json
import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from lillama.distill.history import History
from lillama.distill.trainer import TrainingState
from lillama.recovery.config import RecoveryConfig
from lillama.recovery.log import HeldOut, RecoveryLog
from lillama.recovery.training import measurement, rises

START = HeldOut(kl=0.5, lm=3.0, norm=0.9)


def traced(*found: HeldOut, lm: float = 0.0) -> History:
    history, config = History(), RecoveryConfig(lm=lm)
    for step, held_out in enumerate([START, *found]):
        if step:
            history.note({"kl": torch.tensor(0.5), "lm": torch.tensor(3.0)}, 10)
        state = {0: {"step": torch.tensor(step)}}
        history.check(
            step, measurement(held_out, history, config), lambda state=state, step=step: state if step else {}
        )
    return history


def risen(*found: HeldOut) -> bool:
    return rises(traced(*found), RecoveryConfig(checks=4))


def logged(history: History) -> RecoveryLog:
    return RecoveryLog.of(1e-3, TrainingState({"all blocks": history}, len(history.losses), 1.0), history)


def kept(history: History) -> int:
    states = history.best_states
    assert (states[0]["step"].item() if states else 0) == history.best_step
    return history.best_step


def test_the_smallest_held_out_loss_is_kept():
    assert kept(traced(HeldOut(0.4, 3, 0.9), HeldOut(0.3, 3, 0.9), HeldOut(0.35, 3, 0.9))) == 2
    assert kept(traced(HeldOut(0.6, 2, 0.9), HeldOut(0.5, 1, 0.9))) == 0  # a tie keeps the start
    assert kept(traced(HeldOut(0.6, 2.9, 0.9), lm=1.0)) == 1
    assert kept(traced(HeldOut(0.6, 2.9, 0.9), lm=0.1)) == 0


def test_a_state_that_is_not_finite_or_whose_activations_grew_is_not_kept():
    assert kept(traced(HeldOut(math.nan, 3, 0.9), HeldOut(0.1, math.inf, 0.9))) == 0
    assert kept(traced(HeldOut(0.1, 3, 1.5), HeldOut(0.1, 3, 0.5), HeldOut(0.4, 3, 1.3))) == 3


def test_a_loss_rises_where_it_lies_above_the_best_one():
    better = HeldOut(0.4, 3, 0.9)
    assert not risen(HeldOut(0.502, 3, 0.9)) and risen(HeldOut(0.53, 3, 0.9))
    assert not risen(better, HeldOut(0.403, 3, 0.9)) and risen(better, HeldOut(0.45, 3, 0.9))
    assert risen(HeldOut(math.nan, 3, 0.9)) and risen(HeldOut(0.4, 3, 1.5))
    bad = traced(better)
    bad.note({"kl": torch.tensor(math.nan), "lm": torch.tensor(3.0)}, 10)
    assert rises(bad, RecoveryConfig())


def test_patience_is_half_of_the_checks():
    assert [RecoveryConfig(checks=checks).patience for checks in (1, 4, 5, 8)] == [2, 2, 3, 4]


def test_a_history_goes_through_a_file():
    history = traced(HeldOut(0.1 + 0.2, 3, 0.9), HeldOut(0.35, 3, 0.9))
    again = History.from_json(json.loads(json.dumps(history.as_json())), history.best_states)
    assert logged(again) == logged(history)
    assert logged(again).improved and logged(again).best_step == 1


def test_the_log_is_valid_json_whatever_happened():
    history = traced(HeldOut(math.nan, 3, 0.9))
    history.note({"kl": torch.tensor(math.nan), "lm": torch.tensor(math.nan)}, 10)
    log = logged(history)
    assert len(log.curve) == 1 and len(log.held_out) == 1 and log.final == START


def test_the_configuration_refuses_nonsense():
    adapter = TypeAdapter(RecoveryConfig)
    assert adapter.validate_python({"epochs": 0}) == RecoveryConfig(epochs=0)
    for wrong in ({"epoch": 1}, {"lm": 1.1}, {"lr": 0}, {"epochs": -1}, {"checks": 0}):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)

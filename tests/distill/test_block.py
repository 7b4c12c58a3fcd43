"""The training of one block, from its initialisation to its best state."""

import itertools
import logging
import math

import pytest
import torch

from lillama.distill import block as module
from lillama.distill.block import Rows, batches, check_steps, distill_block, step_total
from lillama.distill.losses import L1Cosine, Mse, TokenMse
from lillama.errors import TrainingError
from lillama.progress import silent

ROWS = Rows.split(24, 0.2, seed=0)


def trained(toy, config, rank=3, report=silent, **data):
    learner = toy.learner(config, step_total(ROWS, config), rank=rank)
    log = distill_block(learner, "model.layers.7", toy.data(stream=config.stream, **data), ROWS, 0, report)
    return learner, log


def state(learner):
    return {name: tensor.clone() for name, tensor in learner.state().items()}


@pytest.mark.parametrize(("total", "share", "held"), [(2, 0.01, 1), (10, 0.2, 2), (3, 0.9, 2), (1, 0.5, 1)])
def test_split_holds_out_at_least_one_and_not_all(total, share, held):
    rows = Rows.split(total, share, seed=3)
    assert len(rows.held_out) == held
    if total > 1:
        assert sorted([*rows.train.tolist(), *rows.held_out.tolist()]) == list(range(total))
    assert Rows.split(100, 0.2, 1).held_out.tolist() != Rows.split(100, 0.2, 2).held_out.tolist()


def test_held_out_rows_are_never_trained_on(toy):
    config = toy.config(epochs=3, batch_size=5)
    seen = list(batches(ROWS, config, seed=4))
    assert len(seen) == step_total(ROWS, config)
    for epoch in range(3):
        rows = torch.cat(seen[epoch * 4 : epoch * 4 + 4]).tolist()
        assert sorted(rows) == ROWS.train.tolist()
    assert not set(torch.cat(seen).tolist()) & set(ROWS.held_out.tolist())
    assert not torch.equal(torch.cat(seen[:4]), torch.cat(seen[4:8]))


def test_checks_follow_epochs_and_end_at_the_last_step(toy):
    assert check_steps(toy.config(epochs=8), 80) == set(range(10, 81, 10))
    assert check_steps(toy.config(epochs=1), 10) == {3, 5, 8, 10}
    assert check_steps(toy.config(epochs=1), 1) == {1}


@pytest.mark.parametrize("stream", ["teacher", "student", "both"])
@pytest.mark.parametrize("loss", [L1Cosine(), Mse(), TokenMse()], ids=lambda loss: loss.name)
def test_training_reduces_the_held_out_loss(toy, stream, loss):
    learner, log = trained(toy, toy.config(stream=stream, loss=loss, lr=1e-2, epochs=6))
    floor = (2 if stream == "both" else 1) * (math.log(1 + math.exp(-1)) if loss.name == "l1-cosine" else 0)
    assert log.improved and log.final - floor < 0.9 * (log.initial - floor)
    held_out = learner.validate(toy.data(stream=stream).micro_batches(ROWS.held_out))
    assert sum(held_out.values()) == pytest.approx(log.final, rel=1e-5)
    assert log.tokens == 6 * len(ROWS.train) * 6
    fed = {"teacher": (True, False), "student": (False, True), "both": (True, True)}[stream]
    assert all((row[1] is not None, row[2] is not None) == fed for row in (*log.curve, *log.held_out))


def test_the_kept_state_is_the_best_of_all_checks(toy, monkeypatch):
    """With a rate that first helps and then harms, the kept state is the one before the harm."""
    states = []
    config = toy.config(lr=2e-3, epochs=8)
    learner = toy.learner(config, step_total(ROWS, config))
    monkeypatch.setattr(type(config), "lr_factor", lambda self, step, steps: 1.0 if step < steps / 2 else 300.0)
    validate = learner.validate
    monkeypatch.setattr(learner, "validate", lambda data: states.append(state(learner)) or validate(data))
    log = distill_block(learner, "b", toy.data(), ROWS, 0, silent)
    totals = [row[1] + row[2] for row in log.held_out]
    assert log.final == min(totals) < totals[-1] and 0 < log.best_step < log.steps
    best = states[totals.index(min(totals))]
    assert all(torch.equal(best[name], tensor) for name, tensor in learner.state().items())


def test_a_block_that_cannot_improve_keeps_its_initialisation(toy):
    config = toy.config(lr=30.0)
    before = toy.student().state_dict()
    learner, log = trained(toy, config)
    assert not log.improved and log.best_step == 0 and log.final == log.initial and log.steps > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.student.state_dict().items())


def test_no_epochs_keep_the_initialisation(toy):
    before = toy.student().state_dict()
    learner, log = trained(toy, toy.config(epochs=0))
    assert (log.steps, log.tokens, log.improved) == (0, 0, False)
    assert all(torch.equal(before[name], tensor) for name, tensor in learner.student.state_dict().items())


def test_a_full_rank_student_stays_at_no_loss(toy):
    config = toy.config(loss=Mse(), stream="teacher", lr=1e-4)
    learner, log = trained(toy, config, rank=12)
    assert log.initial < 1e-10 and log.final <= log.initial
    x = toy.data().teacher.read(torch.arange(24))
    torch.testing.assert_close(learner.student(x)[0], toy.teacher(x)[0], atol=1e-4, rtol=1e-4)


def test_the_log_watches_the_largest_singular_values(toy):
    learner, log = trained(toy, toy.config(lr=1e-2))
    start = torch.linalg.svdvals(toy.student().up.product())[0].item()
    kept = torch.linalg.svdvals(learner.student.up.product())[0].item()
    assert log.singular["up"] == pytest.approx((start, kept), rel=1e-4)
    assert start != pytest.approx(kept, rel=1e-3) and list(log.singular) == ["up", "down"]


def broken_loss(monkeypatch, times):
    """Let the training loss be NaN at the third step of the first `times` attempts."""
    attempts = itertools.count(1)
    step = module.Learner.step

    def spoilt(self, batch, tokens):
        losses = step(self, batch, tokens)
        if self.step_count == 3 and next(attempts) <= times:
            with torch.no_grad():
                for parameter in self.student.parameters():
                    parameter.fill_(math.nan)
            return dict.fromkeys(losses, torch.tensor(math.nan))
        return losses

    monkeypatch.setattr(module.Learner, "step", spoilt)


def test_one_bad_loss_is_tried_again_at_half_the_rate(toy, monkeypatch, caplog):
    broken_loss(monkeypatch, times=1)
    config = toy.config()
    with caplog.at_level(logging.WARNING):
        learner, log = trained(toy, config)
    assert log.retried and log.improved and log.lr == config.lr / 2
    assert log.steps == step_total(ROWS, config) and all(map(math.isfinite, (log.initial, log.final)))
    assert "model.layers.7" in caplog.text and "step 3" in caplog.text
    assert all(tensor.isfinite().all() for tensor in learner.state().values())
    monkeypatch.undo()
    _, halved = trained(toy, toy.config(lr=config.lr / 2))
    assert halved.final == log.final  # from the initialisation, with a fresh optimiser


def test_a_second_bad_loss_is_an_error_naming_block_and_step(toy, monkeypatch):
    broken_loss(monkeypatch, times=2)
    with pytest.raises(TrainingError, match=r"model\.layers\.7: .*step 3") as caught:
        trained(toy, toy.config())
    assert caught.value.exit_status == 1


def test_a_teacher_that_overflows_is_an_error(toy):
    data = toy.data()
    data.target.write(slice(0, 24), torch.full((24, 6, 12), math.inf))
    config = toy.config()
    with pytest.raises(TrainingError, match=r"model\.layers\.7: .*step 0"):
        distill_block(toy.learner(config), "model.layers.7", data, ROWS, 0, silent)


def test_progress_tells_steps_tokens_and_loss(toy, monkeypatch):
    monkeypatch.setattr(module, "REPORT_SECONDS", -1)
    told = []
    _, log = trained(toy, toy.config(), report=told.append)
    assert [p.done for p in told] == list(range(1, log.steps + 1)) and {p.total for p in told} == {log.steps}
    assert told[-1].tokens == log.tokens and told[-1].detail == "model.layers.7"
    assert all(p.task == "steps" and p.loss is not None and p.loss > 0 for p in told)


def test_micro_batches_change_nothing_but_rounding(toy):
    (first, whole), (second, parts) = (trained(toy, toy.config(clip=0.5), micro_batch=size) for size in (24, 1))
    assert parts.final == pytest.approx(whole.final, rel=1e-4) and parts.tokens == whole.tokens
    for name, tensor in first.state().items():
        torch.testing.assert_close(second.state()[name], tensor, atol=1e-4, rtol=1e-3)


def test_same_seed_same_bits(toy):
    first, second = trained(toy, toy.config()), trained(toy, toy.config())
    assert first[1] == second[1]
    assert all(torch.equal(tensor, second[0].state()[name]) for name, tensor in first[0].state().items())

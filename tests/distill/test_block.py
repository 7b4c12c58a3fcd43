"""The training of one block, from its initialisation to its best state."""

import itertools
import logging
import math

import pytest
import torch

from lillama.distill import trainer as module
from lillama.distill.block import BlockTraining, distill_block
from lillama.distill.config import OptimConfig
from lillama.distill.learner import Learner
from lillama.distill.losses import L1Cosine, Mse, TokenMse
from lillama.distill.split import Split
from lillama.errors import TrainingError
from lillama.system.progress import silent

SPLIT = Split.of(24, 0.2, seed=0)


def trained(toy, config, rank=3, report=silent, trainer=None, **data):
    trainer = trainer or toy.trainer(config, SPLIT)
    learner = toy.learner(config, len(trainer.batches), rank=rank)
    around = toy.data(stream=config.stream, **data)
    return learner, distill_block(learner, "model.layers.7", around, SPLIT.held_out, trainer, report)


def state(learner):
    return {name: tensor.clone() for name, tensor in learner.state().items()}


@pytest.mark.parametrize("stream", ["teacher", "student", "both"])
@pytest.mark.parametrize("loss", [L1Cosine(), Mse(), TokenMse()], ids=lambda loss: loss.name)
def test_training_reduces_the_held_out_loss(toy, stream, loss):
    learner, log = trained(toy, toy.config(stream=stream, loss=loss, lr=1e-2, epochs=6))
    floor = (2 if stream == "both" else 1) * (math.log(1 + math.exp(-1)) if loss.name == "l1-cosine" else 0)
    assert log.improved and log.final - floor < 0.9 * (log.initial - floor)
    held_out = learner.validate(toy.data(stream=stream).micro_batches(SPLIT.held_out))
    assert sum(held_out.values()) == pytest.approx(log.final, rel=1e-5)
    assert log.tokens == 6 * len(SPLIT.train) * 6
    fed = {"teacher": (True, False), "student": (False, True), "both": (True, True)}[stream]
    assert all((row[1] is not None, row[2] is not None) == fed for row in (*log.curve, *log.held_out))


def test_the_kept_state_is_the_best_of_all_checks(toy, monkeypatch):
    """With a rate that first helps and then harms, the kept state is the one before the harm."""
    states = []
    config = toy.config(lr=2e-3, epochs=8)
    trainer = toy.trainer(config, SPLIT)
    learner = toy.learner(config, len(trainer.batches))
    monkeypatch.setattr(OptimConfig, "lr_factor", lambda self, step, steps: 1.0 if step < steps / 2 else 300.0)
    validate = learner.validate
    monkeypatch.setattr(learner, "validate", lambda data: states.append(state(learner)) or validate(data))
    log = distill_block(learner, "b", toy.data(), SPLIT.held_out, trainer, silent)
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
    x = toy.data().activations.teacher.read(torch.arange(24))
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
    step = Learner.step

    def spoilt(self, batch, tokens):
        losses = step(self, batch, tokens)
        if self.step_count == 3 and next(attempts) <= times:
            with torch.no_grad():
                for parameter in self.student.parameters():
                    parameter.fill_(math.nan)
            return dict.fromkeys(losses, torch.tensor(math.nan))
        return losses

    monkeypatch.setattr(Learner, "step", spoilt)


def test_one_bad_loss_is_tried_again_at_half_the_rate(toy, monkeypatch, caplog):
    broken_loss(monkeypatch, times=1)
    config = toy.config()
    with caplog.at_level(logging.WARNING):
        learner, log = trained(toy, config)
    assert log.retried and log.improved and log.lr == config.lr / 2
    assert log.steps == len(toy.trainer(config, SPLIT).batches) and all(map(math.isfinite, (log.initial, log.final)))
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
    data.activations.target.write(slice(0, 24), torch.full((24, 6, 12), math.inf))
    config = toy.config()
    with pytest.raises(TrainingError, match=r"model\.layers\.7: .*step 0"):
        distill_block(toy.learner(config), "model.layers.7", data, SPLIT.held_out, toy.trainer(config, SPLIT), silent)


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
    assert_same_bits(trained(toy, toy.config()), trained(toy, toy.config()))


class Killed(BaseException):
    """The end of the process, as far as this one can play it."""


def killed(monkeypatch, at):
    """Let training end without a chance to clean up before each of some steps, counted over all attempts."""
    step, taken = BlockTraining.step, []

    def counted(self, *args):
        taken.append(1)
        if len(taken) in at:
            raise Killed
        return step(self, *args)

    monkeypatch.setattr(BlockTraining, "step", counted)
    return taken


def assert_same_bits(first, second):
    assert first[1] == second[1]
    assert all(torch.equal(tensor, second[0].state()[name]) for name, tensor in first[0].state().items())


@pytest.mark.parametrize("stop", [2, 6, 12])
def test_a_killed_training_goes_on_in_its_middle_to_the_same_bits(toy, monkeypatch, stop):
    config = toy.config(lr_schedule="cosine", clip=0.5)
    whole, trainer = trained(toy, config), toy.trainer(config, SPLIT, name="killed", snapshot_seconds=0)
    taken = killed(monkeypatch, {stop})
    with pytest.raises(Killed):
        trained(toy, config, trainer=trainer)
    assert (trainer.folder / "first" / "state.json").is_file()
    assert_same_bits(whole, trained(toy, config, trainer=trainer))
    assert len(taken) == len(trainer.batches) + 1


def test_a_second_attempt_goes_on_in_its_middle_too(toy, monkeypatch):
    config, step = toy.config(), Learner.step
    trainer = toy.trainer(config, SPLIT, name="killed", snapshot_seconds=0)

    def spoilt(self, batch, tokens):
        losses, bad = step(self, batch, tokens), self.lr == config.lr and self.step_count == 3
        return dict.fromkeys(losses, torch.tensor(math.nan)) if bad else losses

    monkeypatch.setattr(Learner, "step", spoilt)
    whole = trained(toy, config)
    killed(monkeypatch, {12})
    with pytest.raises(Killed):
        trained(toy, config, trainer=trainer)
    assert (trainer.folder / "second" / "state.json").is_file()
    found = trained(toy, config, trainer=trainer)
    assert found[1].retried
    assert_same_bits(whole, found)


def test_a_killed_training_remembers_a_best_state_of_long_ago(toy, monkeypatch):
    """The rate first helps and then harms."""
    monkeypatch.setattr(OptimConfig, "lr_factor", lambda self, step, steps: 1.0 if step < steps / 2 else 300.0)
    config = toy.config(epochs=8)
    whole, trainer = trained(toy, config), toy.trainer(config, SPLIT, name="killed", snapshot_seconds=0)
    assert 0 < whole[1].best_step < whole[1].steps
    killed(monkeypatch, {len(trainer.batches)})
    with pytest.raises(Killed):
        trained(toy, config, trainer=trainer)
    assert_same_bits(whole, trained(toy, config, trainer=trainer))

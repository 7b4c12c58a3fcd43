"""The joint schedule against a plain reimplementation, and against itself with little memory or after a kill."""

import copy
import math
from dataclasses import dataclass, field

import pytest
import torch

from lillama.distill import trainer as trainer_module
from lillama.distill.config import OptimConfig
from lillama.distill.joint import JointData, JointTraining, distill_stack
from lillama.distill.learner import Learner
from lillama.distill.losses import L1Cosine
from lillama.distill.objective import LossScale, Objective
from lillama.distill.pool import LearnerPool
from lillama.distill.split import Batches, Split
from lillama.errors import TrainingError
from lillama.stream.calls import BlockArgs, BlockInputs
from lillama.system.progress import silent

SPLIT, TRAINED, BLOCKS = Split.of(24, 0.2, seed=0), (0, 2), 3


@dataclass
class Class:
    """Three teachers, of which the first and the last are compressed."""

    toy: object
    config: object
    teachers: list = field(default_factory=list)
    students: dict = field(default_factory=dict)

    def __post_init__(self):
        for index in range(BLOCKS):
            torch.manual_seed(index)
            self.teachers.append(type(self.toy.teacher)().requires_grad_(False))
        for index in TRAINED:
            self.students[index] = type(self.toy)(self.toy.folder, self.teachers[index]).student()

    @property
    def batches(self):
        return Batches(SPLIT.train, self.config.epochs, self.config.batch_size, 5)

    def learner(self, index, scale=1.0):
        student, optim, objective = self.students[index], self.config.optim, Objective(self.config, LossScale(scale))
        return Learner(copy.deepcopy(student), optim, self.config.lr, len(self.batches), objective)

    def training(self, resident=9, name="joint"):
        hidden = self.toy.data().activations.teacher
        return JointTraining(
            names={index: f"layers.{index}" for index in TRAINED},
            last=max(TRAINED),
            teacher=lambda index: self.teachers[index],
            pool=LearnerPool(self.learner, self.toy.folder / f"{name}-pool", resident),
            data=JointData(BlockInputs([BlockArgs()] * BLOCKS), hidden, None, 3),
            held_out=SPLIT.held_out,
            config=self.config,
        )

    def finished(self, resident=9, name="joint", snapshot_seconds=1e9):
        trainer = self.toy.trainer(self.config, SPLIT, 5, name, snapshot_seconds)
        trained = distill_stack(self.training(resident, name), trainer, silent)
        return {index: ({n: t.clone() for n, t in learner.state().items()}, log) for index, learner, log in trained}


def assert_same_bits(first, second):
    for index in TRAINED:
        assert first[index][1] == second[index][1]
        for name, tensor in first[index][0].items():
            assert torch.equal(tensor, second[index][0][name]), (index, name)


@pytest.fixture
def school(toy):
    return Class(toy, toy.config(epochs=2, lr=2e-3, lr_schedule="cosine", clip=1.0))


@pytest.mark.parametrize(
    ("stream", "adaptive"), [("teacher", 0.0), ("student", 0.0), ("both", 0.0), ("student", 1.0), ("both", 0.3)]
)
def test_equals_a_plain_reimplementation(toy, stream, adaptive):
    school = Class(toy, toy.config(stream=stream, epochs=1, lr=1e-3, adaptive=adaptive))
    results = school.finished()
    students = {index: copy.deepcopy(student).requires_grad_() for index, student in school.students.items()}
    optimisers = {index: torch.optim.AdamW(s.parameters(), lr=1e-3, weight_decay=0.0) for index, s in students.items()}
    x, loss = toy.data().activations.teacher.read(torch.arange(24)), L1Cosine()

    def held_out():
        with torch.no_grad():
            above, own, totals = x[SPLIT.held_out], x[SPLIT.held_out], {}
            for index in range(BLOCKS):
                target = school.teachers[index](above)[0]
                block = students.get(index, school.teachers[index])
                mixed = torch.lerp(target, school.teachers[index](own)[0], adaptive)
                parts = [loss(block(above)[0], target).mean(), loss(block(own)[0], mixed).mean()]
                totals[index] = {"teacher": parts[0], "student": parts[1], "both": sum(parts)}[stream].item()
                above, own = target, block(own)[0]
        return totals

    initial = held_out()
    for rows in school.batches:
        above = own = x[rows]
        for index in range(BLOCKS):
            target = school.teachers[index](above)[0]
            if index in students:
                mixed = torch.lerp(target, school.teachers[index](own)[0], adaptive)
                fed = {"teacher": [(above, target)], "student": [(own, mixed)], "both": [(above, target), (own, mixed)]}
                sum(loss(students[index](hidden)[0], wanted).mean() for hidden, wanted in fed[stream]).backward()
                optimisers[index].step()
                optimisers[index].zero_grad()
            with torch.no_grad():
                own = students.get(index, school.teachers[index])(own)[0]
            above = target
    final = held_out()
    half = {"teacher": 1, "student": 1, "both": 2}[stream]
    for index, student in students.items():
        state, log = results[index]
        doubled = half if index == 0 else 1  # before the streams part, one loss is logged and counts twice
        assert log.initial * doubled == pytest.approx(initial[index], rel=1e-5)
        assert log.improved and log.best_step == log.steps == len(school.batches)
        assert log.final * doubled == pytest.approx(final[index], rel=1e-4)
        for name, parameter in student.named_parameters():
            torch.testing.assert_close(state[name], parameter.detach(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("resident", [0, 1])
def test_learners_that_wait_in_files_learn_the_same(school, resident):
    assert_same_bits(school.finished(), school.finished(resident, "small"))
    assert list((school.toy.folder / "small-pool").glob("learner-*"))


@pytest.mark.parametrize("resident", [1, 9])
def test_a_killed_training_goes_on_to_the_same_bits(school, monkeypatch, resident):
    whole = school.finished()
    for stop in (1, 4, 7):
        name = f"stopped-{stop}-{resident}"
        taken, step = [], JointTraining.step

        class Killed(Exception):
            pass

        def counted(self, *args, taken=taken, step=step, stop=stop, Killed=Killed):
            taken.append(1)
            if len(taken) == stop + 1:
                raise Killed
            return step(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(JointTraining, "step", counted)
            with pytest.raises(Killed):
                school.finished(resident, name, snapshot_seconds=-1)
            assert (school.toy.folder / name / "state.json").is_file()
            assert_same_bits(whole, school.finished(resident, name))
        assert len(taken) == len(school.batches) + 1


def test_a_killed_training_remembers_its_best_state(school, monkeypatch):
    """The best state may lie before the snapshot: here the rate first helps and then harms."""
    monkeypatch.setattr(OptimConfig, "lr_factor", lambda self, step, steps: 1.0 if step < steps / 2 else 300.0)
    whole = school.finished()
    assert all(0 < log.best_step < log.steps for _, log in whole.values())
    last = len(school.batches)
    snapshot_at(monkeypatch, last - 1)
    school.finished(name="again", snapshot_seconds=-1)
    assert_same_bits(whole, school.finished(name="again"))


def snapshot_at(monkeypatch, step):
    """Let a snapshot be written after one step only."""
    save = trainer_module._save
    monkeypatch.setattr(trainer_module, "_save", lambda t, state, f: save(t, state, f) if state.done == step else None)


@pytest.mark.parametrize("resident", [1, 9])
def test_a_bad_loss_costs_one_block_half_its_rate(school, monkeypatch, resident):
    spoil(monkeypatch, school, times=1)
    results = school.finished(resident)
    assert results[2][1].retried and results[2][1].lr == school.config.lr / 2
    assert not results[0][1].retried
    assert results[2][1].final < results[2][1].initial < math.inf


def test_a_killed_retry_goes_on_to_the_same_bits(school, monkeypatch):
    spoil(monkeypatch, school, times=1)
    whole = school.finished()
    spoil(monkeypatch, school, times=1)
    last = len(school.batches)
    snapshot_at(monkeypatch, last - 2)
    school.finished(name="again", snapshot_seconds=-1)
    assert_same_bits(whole, school.finished(name="again"))


def test_a_retry_that_waits_in_a_file_learns_the_same(school, monkeypatch):
    spoil(monkeypatch, school, times=1)
    whole = school.finished()
    spoil(monkeypatch, school, times=1)
    assert_same_bits(whole, school.finished(1, "small"))


def test_a_second_bad_loss_is_an_error(school, monkeypatch):
    spoil(monkeypatch, school, times=2)
    with pytest.raises(TrainingError, match=r"layers\.2: .*step \d"):
        school.finished()


def spoil(monkeypatch, school, times):
    """Let the second step of the last block's student break it, `times` times after its start at a rate."""
    monkeypatch.undo()
    step, done = Learner.step, []

    def spoilt(self, batch, tokens):
        losses = step(self, batch, tokens)
        if self.objective.scale.output == 1.5 and self.lr not in done and len(done) < times:
            done.append(self.lr)
            with torch.no_grad():
                next(self.student.parameters()).fill_(math.nan)
        return losses

    def learner(index):
        return Class.learner(school, index, 1.5 if index == 2 else 1.0)

    monkeypatch.setattr(Learner, "step", spoilt)
    monkeypatch.setattr(school, "learner", learner, raising=False)

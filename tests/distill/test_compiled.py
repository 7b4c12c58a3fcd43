"""torch.compile changes the speed of a step, and the rounding, but nothing else."""

import gc
import re
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.exc import Unsupported

from lillama.distill import compile as compiled
from lillama.distill.learner import Learner
from lillama.distill.objective import LossScale, Objective
from lillama.stream.calls import BlockArgs

ROWS = torch.arange(8)
scalar = torch.backends.cpu.get_cpu_capability() == "DEFAULT"  # for which the code that torch writes does not compile
needs_compiler = pytest.mark.skipif(
    scalar or not shutil.which("c++"), reason="torch.compile needs a C++ compiler and vector instructions"
)
OWN = (
    "`torch.jit.script` is",
    "`torch.jit.script_method` is",
    "The .grad attribute of a Tensor",
)  # torch's own business
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in OWN]


@pytest.fixture
def calls(monkeypatch):
    """Count what runs compiled, which itself is left out."""
    sizes = []

    def fake(function, **options):
        assert options["dynamic"] is False
        return lambda hidden: sizes.append(len(hidden)) or function(hidden)

    monkeypatch.setattr(torch, "compile", fake)
    return sizes


def learner(toy, rows: int, **changes) -> Learner:
    config = toy.config(stream="student", **changes)
    objective = Objective(config, LossScale(parts={"up": 1.0, "down": 1.0}))
    return Learner(toy.student(), config.optim, config.lr, 10, objective, compiled=rows)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_step_is_the_same_step(toy, dtype):
    plain, fast = learner(toy, 0), learner(toy, 5)
    batch = toy.batch(toy.data(stream="student", micro_batch=5, dtype=dtype), ROWS)
    for _ in range(3):
        found = [one.step(batch, 48)["student"] for one in (plain, fast)]
        torch.testing.assert_close(*found, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)
    assert fast._fast.fast is not None
    held_out = [one.validate(batch)["student"] for one in (plain, fast)]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-4 if dtype == torch.float32 else 1e-2)


@needs_compiler
@torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=2)
def test_many_blocks_of_different_ranks_are_compiled_and_let_go(toy):
    students = []
    for rank in range(1, 5):
        one = Learner(toy.student(rank), toy.config().optim, 1e-3, 10, compiled=5)
        one.run(BlockArgs(), torch.randn(5, 6, 12)).sum().backward()
        assert one._fast.fast is not None
        students.append(weakref.ref(one.student))
    del one
    gc.collect()
    assert not any(student() for student in students)


def test_only_whole_micro_batches_with_gradients_are_compiled(toy, calls):
    one = learner(toy, 5)
    data = toy.data(stream="student", micro_batch=5)
    one.step(toy.batch(data, ROWS), 48)
    assert calls == [5, 5]  # the first is a trial
    one.validate(toy.batch(data, ROWS))
    one.forward(BlockArgs(), torch.randn(5, 6, 12))
    one.uncompiled(BlockArgs(), torch.randn(5, 6, 12))
    assert calls == [5, 5]
    one.with_lr(one.lr / 2).step(toy.batch(data, ROWS), 48)
    assert calls == [5, 5, 5]


def test_outputs_of_children_are_watched_without_it(toy, calls):
    one, data = learner(toy, 5, sub_blocks=0.5), toy.data(stream="student", micro_batch=5)
    parts = {name: toy.store(name, torch.randn(24, 6, size)) for name, size in (("up", 20), ("down", 12))}
    data = replace(data, activations=replace(data.activations, parts=parts))
    one.step(toy.batch(data, ROWS), 48)
    assert not calls


@pytest.fixture
def told(caplog):
    """What is said of blocks that are not compiled."""
    compiled._tell.cache_clear()
    return lambda: [record.message for record in caplog.records if record.name == compiled.__name__]


def broken_at_once(function, **options):
    raise OSError("no such thing")


def broken_forward(function, **options):
    def run(*args):
        raise Unsupported("no such thing\nmore of it")

    return run


def broken_backward(function, **options):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise Unsupported("no such thing\nmore of it")

    return lambda *args: (Broken.apply(function(*args)[0]),)


@pytest.mark.parametrize("broken", [broken_at_once, broken_forward, broken_backward])
def test_what_cannot_be_compiled_is_taught_all_the_same_and_said_once(toy, monkeypatch, told, broken):
    monkeypatch.setattr(torch, "compile", broken)
    losses = []
    for rows in (0, 5, 5):
        batch = toy.batch(toy.data(stream="student", micro_batch=5), ROWS)
        losses.append(learner(toy, rows).step(batch, 48)["student"].item())
    assert losses[0] == losses[1] == losses[2]
    kind = "OSError" if broken is broken_at_once else "Unsupported"
    assert told() == [f"torch.compile is of no help here, and blocks are taught without it: {kind}: no such thing"]


class Routed(nn.Module):
    """Gives some tokens to a linear, as a mixture of experts does."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, hidden):
        chosen = hidden[hidden[..., 0] > 0]
        return hidden + chosen.sum() if len(chosen) > 3 else self.linear(hidden)


class Unrolled(nn.Module):
    """Goes through a sequence step by step, as some state-space models do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, hidden):
        for _ in range(compiled.MOST_OPERATIONS):
            hidden = torch.tanh(hidden)
        return self.linear(hidden)


@pytest.mark.parametrize(
    ("kind", "reason"), [(Routed, "data-dependent|Unsupported|GuardOn"), (Unrolled, "20[0-9] operations")]
)
def test_blocks_that_would_be_compiled_again_and_again_or_for_very_long_are_not(toy, kind, reason, told):
    student, x = kind(), torch.randn(5, 6, 12)
    one = Learner(student, toy.config().optim, 1e-3, 10, compiled=5)
    for _ in range(2):
        torch.testing.assert_close(one.run(BlockArgs(), x), student(x))
    assert one._fast.fast is None
    assert len(told()) == 1 and re.search(reason, told()[0])


def test_memory_that_runs_out_is_not_taken_for_the_compilers_fault(toy, monkeypatch, told):
    def full(function, **options):
        def run(*args):
            raise torch.OutOfMemoryError

        return run

    monkeypatch.setattr(torch, "compile", full)
    with pytest.raises(torch.OutOfMemoryError):
        learner(toy, 5).run(BlockArgs(), torch.randn(5, 6, 12))
    assert not told()

"""The sequential schedule with everything that can be asked of a student."""

import json
import shutil
import threading
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lillama.distill.compile import Compiled
from lillama.errors import ModelError
from lillama.files.artefacts import load_tensors
from lillama.pipeline import context, schedules
from lillama.pipeline.api import compress
from lillama.recipes.options import Machine
from lillama.recovery.config import RecoveryConfig
from lillama.stream.model import StreamedModel
from lillama.system.memory import MemoryBudget

EVERYTHING = {"look_ahead": 0.5, "sub_blocks": 0.3, "adaptive": 0.5, "norm": 0.1}
SWITCHES = [{"look_ahead": 0.5}, EVERYTHING]


@pytest.fixture
def short(quick):
    def make(**distill):
        return quick(distill={"epochs": 1} | distill, calibration={"tokens": 320})

    return make


def blocks(result):
    return {file.name: file.read_bytes() for file in sorted((result.run / "blocks").iterdir())}


@pytest.mark.parametrize("switches", SWITCHES, ids=" ".join)
def test_a_resumed_run_ends_with_the_same_bits(tiny, short, tmp_path, switches):
    recipe, out = short(**switches), tmp_path / "out"
    whole = compress(tiny, out, recipe=recipe)
    before = blocks(whole)
    plain = blocks(compress(tiny, tmp_path / "plain", recipe=short()))
    assert before["0001.safetensors"] != plain["0001.safetensors"]
    for index in (1, 2):
        for missing in range(index, 3):
            (whole.run / "blocks" / f"{missing:04}.json").unlink()
        shutil.rmtree(out)
        assert blocks(compress(tiny, out, recipe=recipe)) == before


@pytest.mark.parametrize("stream", ["teacher", "both"])
def test_activations_on_disk_give_the_same_bits(tiny, short, tmp_path, stream):
    recipe = short(stream=stream, **EVERYTHING | {"adaptive": 0.0 if stream == "teacher" else 0.5})
    machines = {"memory": Machine(), "disk": Machine(activation_memory=0), "small": Machine(micro_batch=8)}
    found = {name: blocks(compress(tiny, tmp_path / name, recipe=recipe, machine=m)) for name, m in machines.items()}
    assert found["memory"] == found["disk"]
    finals = [[json.loads(text)["final"] for name, text in files.items() if "json" in name] for files in found.values()]
    assert finals[2] == pytest.approx(finals[0], rel=1e-2)


@pytest.mark.parametrize("schedule", ["sequential", "joint"])
def test_every_learner_is_compiled_where_that_is_asked_for(tiny, short, tmp_path, schedule, monkeypatch):
    made, passed, init = list[nn.Module](), Counter[nn.Module](), Compiled.__init__

    def counted(self, block):
        init(self, block)
        self._compiled = lambda args, kwargs: (
            made.append(block) or (lambda *a, **k: passed.update([block]) or block(*a, **k))
        )

    monkeypatch.setattr(Compiled, "__init__", counted)
    let_go: list[int] = []
    monkeypatch.setattr(context.gc, "collect", lambda: let_go.append(len(made)))
    recipe = replace(short(schedule=schedule), recover=RecoveryConfig(epochs=1))
    plain = blocks(compress(tiny, tmp_path / "plain", recipe=recipe))
    assert not made and not let_go
    found = blocks(compress(tiny, tmp_path / "fast", recipe=recipe, machine=Machine(compile=True)))
    assert found == plain
    assert len(made) == 6 and set(passed) == set(made)  # three blocks, taught and recovered
    assert let_go == ([1, 2, 3, 6] if schedule == "sequential" else [3, 6])  # so many were made by then


def test_every_block_of_the_teacher_is_read_once(tiny, short, tmp_path, monkeypatch):
    reads, block = Counter(), StreamedModel.block
    monkeypatch.setattr(StreamedModel, "block", lambda self, index: reads.update([index]) or block(self, index))
    compress(tiny, tmp_path / "plain", recipe=short())
    plain = dict(reads)
    reads.clear()
    compress(tiny, tmp_path / "ahead", recipe=short(look_ahead=0.5))
    assert reads == plain and set(reads) == {0, 1, 2}


@pytest.mark.parametrize("ample", [True, False])
def test_the_next_block_is_read_while_one_is_taught_where_memory_is_ample(tiny, short, tmp_path, monkeypatch, ample):
    ahead, block, train = {index: threading.Event() for index in range(3)}, StreamedModel.block, schedules.distill_block

    def read(self, index):
        found = block(self, index)
        if threading.current_thread() is not threading.main_thread():
            ahead[index].set()
        return found

    def taught(learner, name, data, *rest):
        if ample and data.index < 2:
            assert ahead[data.index + 1].wait(300)
        return train(learner, name, data, *rest)

    plain = compress(tiny, tmp_path / "plain", recipe=short())
    monkeypatch.setattr(StreamedModel, "block", read)
    monkeypatch.setattr(schedules, "distill_block", taught)
    monkeypatch.setattr(MemoryBudget, "is_ample_for", lambda self, needed: ample)
    found = compress(tiny, tmp_path / "out", recipe=short())
    assert [ahead[index].is_set() for index in range(3)] == [False, ample, ample]
    without_times = [{k: v for k, v in blocks(r).items() if "json" not in k} for r in (found, plain)]
    assert without_times[0] == without_times[1]


def test_trouble_with_a_block_that_is_read_ahead_is_told_in_its_turn(tiny, short, tmp_path, monkeypatch):
    block = StreamedModel.block

    def read(self, index):
        if threading.current_thread() is not threading.main_thread() and index == 2:
            raise ModelError("gone")
        return block(self, index)

    monkeypatch.setattr(StreamedModel, "block", read)
    with pytest.raises(ModelError, match="gone"):
        compress(tiny, tmp_path / "out", recipe=short())
    assert (tmp_path / "out.run" / "blocks" / "0001.safetensors").is_file()


def test_the_last_block_has_no_next_one(tiny, short, tmp_path):
    """Behind it stands no block: its loss is that of its own output, in the same units."""
    plain, ahead = (compress(tiny, tmp_path / str(w), recipe=short(look_ahead=w, epochs=0)) for w in (0.0, 0.5))
    initial = [[json.loads(text)["initial"] for n, text in blocks(r).items() if "json" in n] for r in (plain, ahead)]
    assert initial[1][0] > initial[0][0] and initial[1][1] > initial[0][1]
    assert initial[1][2] == initial[0][2]


def test_finished_blocks_keep_the_masters_precision(make_model, short, tmp_path):
    """A bf16 model's run holds fp32 blocks; only the result is rounded."""
    result = compress(make_model(dtype=torch.bfloat16), tmp_path / "out", recipe=short())
    state = load_tensors(result.run / "blocks" / "0001.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    left = state["mlp.up_proj.left.weight"]
    assert not torch.equal(left, left.bfloat16().float())
    with safe_open(next(result.path.glob("*.safetensors")), "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys() if "layers.1" in name} == {torch.bfloat16}  # noqa: SIM118

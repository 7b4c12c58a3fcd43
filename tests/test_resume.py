"""Killed at any instant, the same call goes on and ends with the same bits."""

import contextlib
import errno
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lillama.cli.app import main
from lillama.files import artefacts
from lillama.files import atomic as files
from lillama.model import checkpoint
from lillama.pipeline import compress as story
from lillama.pipeline import recovery, schedules
from lillama.pipeline.api import compress
from lillama.recipes.recipe import Recipe, load_recipe

sys.path.append(str(Path(__file__).parent.parent / "bench"))

import kills
from kills import outcome as bits

SCHEDULES = ("sequential", "joint")


@pytest.fixture(scope="module")
def worker() -> Iterator[kills.Worker]:
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    with kills.worker() as runner:
        yield runner


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sigkill_at_any_moment(worker, tiny, quick, text, tmp_path, schedule):
    recipe = quick(distill={"schedule": schedule})
    out = tmp_path / "out"
    job = {"model": str(tiny), "recipe": recipe.as_dict(), "texts": [str(text)]}
    worker.job = job | {"out": str(tmp_path / "whole")}
    begin = time.monotonic()
    assert worker.run() == 0
    whole = time.monotonic() - begin
    chance = random.Random(schedule)

    def later(share: float) -> Callable[[], bool]:
        end = time.monotonic() + share * whole
        return lambda: time.monotonic() > end

    worker.job = job | {"out": str(out)}
    run, half_written = tmp_path / "out.run", tmp_path / ".out.lillama" / "new"
    taught = run / "blocks" / "0001.json" if schedule == "sequential" else run / "joint" / "state.json"
    killed = [worker.run(later(chance.uniform(0.05, 0.3))) for _ in range(2)]
    killed += [worker.run(taught.exists), worker.run(later(chance.uniform(0.05, 0.2)))]
    killed += [worker.run(half_written.exists), worker.run((half_written / "config.json").exists)]
    assert killed.count(signal.SIGKILL) >= 4  # a sudden burst of speed can let a random moment come too late
    assert 0 in killed or not out.exists()
    assert worker.run() == 0
    assert bits(out) == bits(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.run", "whole", "whole.run"}
    assert not list(run.rglob(".*"))
    assert worker.run(half_written.exists) == signal.SIGKILL  # now an earlier result is there: it stays
    assert bits(out) == bits(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", kills.JOBS)
def test_every_file_is_the_same_after_random_kills(worker, tmp_path, name):
    """As `make kills` does, which takes its time."""
    folder = tmp_path / "runs"
    folder.mkdir()
    where, different = kills.tried(worker, kills.jobs(tmp_path)[name], folder, 4, random.Random(name))
    assert where.total() == 4 and not different


class Crash(BaseException):
    """The end of the process, as far as this one can play it."""


@pytest.fixture
def crash_at(monkeypatch) -> Callable[[float, BaseException], list[str]]:
    """Return a function that lets the n-th atomic write raise an error; it returns the list of the writes so far."""
    atomic_file = files.atomic_file

    def set_crash(number: float, error: BaseException) -> list[str]:
        writes: list[str] = []

        @contextlib.contextmanager
        def counted(path: Path) -> Iterator[Path]:
            writes.append(path.name)
            with atomic_file(path) as temporary:
                yield temporary
                if len(writes) >= number:
                    raise error

        for module in (files, artefacts):
            monkeypatch.setattr(module, "atomic_file", counted)
        return writes

    return set_crash


@pytest.fixture
def short(quick) -> Callable:
    """Return a function that makes the shortest recipe of a schedule."""
    return lambda schedule: quick(distill={"schedule": schedule, "epochs": 1}, calibration={"tokens": 320})


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_crash_at_every_write(make_model, short, tmp_path, schedule, crash_at, monkeypatch):
    tiny = make_model(num_hidden_layers=2)
    recipe = short(schedule)
    monkeypatch.setitem(story.SCHEDULES, "sequential", partial(schedules.distill_sequentially, snapshot_seconds=0))
    monkeypatch.setitem(story.SCHEDULES, "joint", partial(schedules.distill_jointly, snapshot_seconds=0))
    writes = crash_at(float("inf"), Crash())
    whole = bits(compress(tiny, tmp_path / "whole", recipe=recipe).path)
    every = {"run.json", "plan.json", "manifest.json", "0001.safetensors", "0001.json", "state.json", "config.json"}
    assert every <= set(writes)
    for number in range(1, len(writes) + 1):
        out = tmp_path / str(number)
        crash_at(number, Crash())
        with pytest.raises(Crash):
            compress(tiny, out, recipe=recipe)
        assert not out.exists() or writes[number - 1] == "metrics.json"
        done = crash_at(float("inf"), Crash())
        assert bits(compress(tiny, out, recipe=recipe).path) == whole, writes[number - 1]
        assert len(done) <= len(writes)


@pytest.fixture
def full_at(monkeypatch) -> Callable[[Callable[[str], bool]], None]:
    """Return a function that lets every kind of write fail, by the name of its file, as if the disk were full."""
    real = (artefacts.write_tensors, Path.write_text, Path.write_bytes, shutil.copyfile, os.posix_fallocate)

    def set_full(wanted: Callable[[str], bool]) -> None:
        write_tensors, write_text, write_bytes, copyfile, reserve = real

        def fail(path: str | Path) -> None:
            name = re.sub(r"^\.(.*)\.\d+\.tmp$", r"\1", Path(path).name)
            if wanted(str(Path(path).parent / name)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        def write(file: Path, tensors: dict, notes=None) -> None:
            try:
                fail(file)
            except OSError as error:  # as safetensors has it
                file.write_bytes(b"half")
                raise SafetensorError(f"Error while serializing: I/O error: (os error {error.errno})") from None
            write_tensors(file, tensors, notes)

        for module in (artefacts, checkpoint):
            monkeypatch.setattr(module, "write_tensors", write)
        monkeypatch.setattr(Path, "write_text", lambda self, *a, **k: (fail(self), write_text(self, *a, **k))[1])
        monkeypatch.setattr(Path, "write_bytes", lambda self, *a, **k: (fail(self), write_bytes(self, *a, **k))[1])
        monkeypatch.setattr(shutil, "copyfile", lambda a, b, **k: (fail(b), copyfile(a, b, **k))[1])
        monkeypatch.setattr(
            os, "posix_fallocate", lambda fd, *a: (fail(Path(f"/proc/self/fd/{fd}").readlink()), reserve(fd, *a))[1]
        )

    return set_full


KINDS = (  # of what is written on the way, and into the result
    "run.json", "spec.json", "tokens.safetensors", "manifest.json", "spectra.safetensors", "plan.json", "allocation.json",
    "blocks/0000.safetensors", "blocks/0000.json", "recovered/0000.safetensors", "log.json", "state.json", "activations",
    "shard-00000.tmp", "tokenizer.json", "config.json", "model.safetensors.index.json", "README.md", "lillama-kept.svg",
    "lillama.json",
)  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_disk_that_is_full_for_each_kind_of_write(make_model, text, tmp_path, schedule, full_at, monkeypatch, capsys):
    """One after the other, in one run: each ends with one line, and the next attempt goes on from there."""
    changes = {
        "keep": 0.7, "ranks": {"multiple_of": 1}, "distill": {"schedule": schedule, "epochs": 1},
        "recover": {"epochs": 2, "lr": 1e-3}, "calibration": {"sources": [{"path": str(text)}], "tokens": 640, "seq_len": 32},
    }  # fmt: skip
    recipe, model = tmp_path / "recipe.yaml", make_model(num_hidden_layers=2)
    recipe.write_text(load_recipe(Recipe(), changes).as_yaml())
    monkeypatch.setitem(story.SCHEDULES, "sequential", partial(schedules.distill_sequentially, snapshot_seconds=0))
    monkeypatch.setitem(story.SCHEDULES, "joint", partial(schedules.distill_jointly, snapshot_seconds=0))
    monkeypatch.setattr(story, "recover", partial(recovery.recover, snapshot_seconds=0))
    options = ["--recipe", str(recipe), "--shard-size", "40kB", "--activation-memory", "0"]

    def compressed(out: Path) -> int:
        with pytest.raises(SystemExit) as exit_:
            main(["compress", str(model), str(out), *options])
        return int(exit_.value.code or 0)

    assert compressed(tmp_path / "whole") == 0
    failed, out = dict[str, str](), tmp_path / "out"
    capsys.readouterr()

    def first_of_its_kind(path: str) -> bool:
        kind = next((kind for kind in KINDS if path.endswith(kind)), None)
        if kind is None or kind in failed:
            return False
        failed[kind] = path
        return True

    while len(failed) <= len(KINDS):
        before = len(failed)
        full_at(first_of_its_kind)
        status, error = compressed(out), capsys.readouterr().err
        if not status:
            break
        assert status == 2 and len(failed) == before + 1
        assert re.fullmatch(r"(warning: .*\n)*error: .*no (space|room).*\n", error), error
        assert not out.exists() and not list(tmp_path.glob(".out*"))
    assert set(failed) == set(KINDS)
    assert bits(out) == bits(tmp_path / "whole")


def test_figures_that_find_no_room_are_no_failure(tiny, quick, tmp_path, full_at, caplog):
    """The result is there by then."""
    full_at(lambda path: path.endswith("metrics.json"))
    result = compress(tiny, tmp_path / "out", recipe=quick(distill={"epochs": 0}))
    assert (result.path / "lillama.json").is_file()
    assert "are not noted" in caplog.text and not (result.run / "metrics.json").exists()


@pytest.mark.parametrize("name", ["card", "kept_plot"])
def test_a_card_that_cannot_be_made_is_no_failure(tiny, quick, tmp_path, monkeypatch, caplog, name):
    def fail(*args: object, **options: object) -> str:
        raise ValueError("odd front matter")

    monkeypatch.setattr(story, name, fail)
    result = compress(tiny, tmp_path / "out", recipe=quick(distill={"epochs": 0}))
    assert (result.path / "lillama.json").is_file() and "left out" in caplog.text and "odd front matter" in caplog.text


def test_a_crash_while_a_run_begins_anew(make_model, short, tmp_path, crash_at):
    """A run folder half cleared by --restart is still known as one."""
    tiny, out = make_model(num_hidden_layers=2), tmp_path / "out"
    compress(tiny, out, recipe=short("sequential"))
    crash_at(1, Crash())
    with pytest.raises(Crash):
        compress(tiny, out, recipe=short("sequential"), seed=1, restart=True)
    (tmp_path / "out.run" / "blocks").mkdir()
    (tmp_path / "out.run" / ".run.json.77.tmp").touch()
    crash_at(float("inf"), Crash())
    result = compress(tiny, out, recipe=short("sequential"), seed=1)
    assert bits(out) == bits(compress(tiny, tmp_path / "whole", recipe=short("sequential"), seed=1).path)
    assert result.recipe.seed == 1

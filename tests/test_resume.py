"""Killed at any instant, the same call goes on and ends with the same bits."""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from lillama import files, making, teach
from lillama.compression import compress
from lillama.errors import ResourceError
from lillama.model import checkpoint

SCHEDULES = ("sequential", "joint")


def bits(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir() if file.name not in ("README.md", "lillama.json")}


@dataclass
class Worker:
    """Runs jobs in processes that can be killed."""

    process: subprocess.Popen
    job: dict = field(default_factory=dict)

    def run(self, kill_when: Callable[[], bool] = lambda: False) -> int:
        """Run the job; kill it with SIGKILL as soon as the condition holds. Return its wait status."""
        self.process.stdin.write(json.dumps(self.job) + "\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        while Path(f"/proc/{child}").exists():
            if kill_when():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.001)
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    script = Path(__file__).with_name("killable.py")
    process = subprocess.Popen([sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "ready\n"
        yield Worker(process)
        process.stdin.close()


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
    run, half_written = tmp_path / "out.run", tmp_path / ".out.tmp"
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

        for module in (files, checkpoint):
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
    monkeypatch.setitem(making.TEACH, "joint", partial(teach.teach_jointly, snapshot_seconds=0))
    writes = crash_at(float("inf"), Crash())
    whole = bits(compress(tiny, tmp_path / "whole", recipe=recipe).path)
    assert {"run.json", "plan.json", "manifest.json", "0001.safetensors", "0001.json", "config.json"} <= set(writes)
    assert ("state.json" in writes) == (schedule == "joint")
    for number in range(1, len(writes) + 1):
        out = tmp_path / str(number)
        crash_at(number, Crash())
        with pytest.raises(Crash):
            compress(tiny, out, recipe=recipe)
        assert not out.exists() or writes[number - 1] == "metrics.json"
        done = crash_at(float("inf"), Crash())
        assert bits(compress(tiny, out, recipe=recipe).path) == whole, writes[number - 1]
        assert len(done) <= len(writes)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_disk_that_fills_up_on_the_way(make_model, short, tmp_path, schedule, crash_at):
    tiny, recipe, out = make_model(num_hidden_layers=2), short(schedule), tmp_path / "out"
    whole = bits(compress(tiny, tmp_path / "whole", recipe=recipe).path)
    crash_at(7, OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x")))
    with pytest.raises(ResourceError, match=r"no space left.*--run"):
        compress(tiny, out, recipe=recipe)
    assert not out.exists()
    crash_at(float("inf"), Crash())
    assert bits(compress(tiny, out, recipe=recipe).path) == whole


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

"""Streams that are closed or full, and signals: the work counts, and one line tells what happened."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lillama.cli.app import main, run
from lillama.cli.process import Output, Stopped, stoppable
from lillama.pipeline import compress as story
from lillama.pipeline.api import compress


class Full:
    """A stream that takes nothing."""

    encoding = "utf-8"

    def __init__(self, number: int) -> None:
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def flush(self) -> None:
        raise OSError(self.number, os.strerror(self.number))

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        raise OSError("no file")


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Signals as a terminal leaves them: `nohup`, or a script's background, would have some of them ignored."""
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


STREAMS = {"closed": None, "full": Full(errno.ENOSPC), "nobody reads": Full(errno.EPIPE), "hung up": Full(errno.EIO)}


def status(*words: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    return int(exit_.value.code or 0)


@pytest.mark.parametrize("kind", STREAMS)
def test_what_is_done_is_done_whoever_listens(tiny, quick, tmp_path, monkeypatch, capsys, kind):
    recipe = tmp_path / "quick.yaml"
    recipe.write_text(quick(distill={"epochs": 0}).as_yaml(), encoding="utf-8")
    for stream in ("stdout", "stderr", "stdin"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, stream, STREAMS[kind])
            assert status("compress", tiny, tmp_path / stream, "--recipe", recipe) == 0
        assert (tmp_path / stream / "lillama.json").is_file()
        error = capsys.readouterr().err
        assert error.count("\n") == (stream == "stdout" and kind in ("full", "hung up")), error


@pytest.mark.parametrize(("kind", "wanted"), [("closed", 0), ("full", 1), ("nobody reads", 0), ("hung up", 1)])
def test_what_is_only_printed_is_not_done_on_a_full_disk(tiny, monkeypatch, capsys, kind, wanted):
    monkeypatch.setattr(sys, "stdout", STREAMS[kind])
    assert status("plan", tiny) == wanted
    error = capsys.readouterr().err
    assert error.count("\n") == wanted and ("error: standard output: " in error) == bool(wanted)


@pytest.mark.parametrize("kind", ["closed", "full", "nobody reads"])
def test_a_refusal_needs_no_stream(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sys, "stderr", STREAMS[kind])
    assert status("plan", tmp_path / "none") == 2


def test_after_a_failure_nothing_more_is_written(capsys):
    taken = []

    class Once(Full):
        def write(self, text: str) -> int:
            taken.append(text)
            return super().write(text)

    out = Output(Once(errno.ENOSPC))
    out.writelines(["a", "b"])
    assert out.write("c") == 1 and taken == ["ab"] and out.failure is not None


def test_closed_streams_keep_their_numbers(tmp_path):
    """A file that is opened while a stream is closed does not become that stream."""
    script = f"""
import sys
from lillama.cli.process import streams
with streams() as out:
    file = open({str(tmp_path / "mine")!r}, "w")
    assert file.fileno() > 2, file.fileno()
    sys.stdout.write("lost")
    sys.stderr.write("lost")
    file.write("mine")
"""
    command = f"{sys.executable} -c '$SCRIPT' <&- >&- 2>&-".replace("'$SCRIPT'", '"$SCRIPT"')
    assert subprocess.run(command, shell=True, env=os.environ | {"SCRIPT": script}, check=False).returncode == 0
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("number", "wanted", "line"),
    [
        (signal.SIGTERM, 143, "error: stopped by SIGTERM; the same command goes on\n"),
        (signal.SIGHUP, 129, "error: stopped by SIGHUP; the same command goes on\n"),
        (signal.SIGINT, 1, "error: interrupted; an interrupted `compress` goes on with the same command\n"),
    ],
)
def test_a_signal_leaves_one_line_and_a_run_that_goes_on(
    tiny, quick, tmp_path, monkeypatch, capsys, number, wanted, line
):
    recipe, assemble = tmp_path / "quick.yaml", story.assemble
    recipe.write_text(quick(distill={"epochs": 1}).as_yaml(), encoding="utf-8")

    def stopped(folder: Path, *rest: object) -> None:
        (folder / "half").touch()
        signal.raise_signal(number)

    monkeypatch.setattr(story, "assemble", stopped)
    before = signal.getsignal(number)
    assert status("compress", tiny, tmp_path / "out", "--recipe", recipe) == wanted
    assert capsys.readouterr().err == line
    assert signal.getsignal(number) == before
    assert {path.name for path in tmp_path.iterdir()} == {"quick.yaml", "out.run"}
    assert not list((tmp_path / "out.run").rglob(".*")) and not (tmp_path / "out.run" / "scratch").exists()
    monkeypatch.setattr(story, "assemble", assemble)
    monkeypatch.setitem(story.SCHEDULES, "sequential", None)  # nothing is taught again
    compress(tiny, tmp_path / "out", recipe=quick(distill={"epochs": 1}))
    assert json.loads((tmp_path / "out" / "lillama.json").read_text())["version"] == 1


def test_other_commands_do_not_promise_to_go_on(capsys):
    assert run(lambda: signal.raise_signal(signal.SIGTERM)) == 143
    assert capsys.readouterr().err == "error: stopped by SIGTERM\n"


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable(lambda number: None):
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


DEAF = """
import os, signal, sys, time
from lillama.cli import app as cli
from lillama.cli import process as cli_process
cli_process.GRACE = float(sys.argv[1])

def work():
    for number in sys.argv[2:]:
        try:
            signal.raise_signal(int(number))
            time.sleep(300)
        except KeyboardInterrupt:
            pass  # as code does that is in the middle of something
    time.sleep(300)

cli.run(work, resumable=True)
"""


@pytest.mark.parametrize(("grace", "signals"), [("0.2", [15]), ("3000", [15, 15]), ("3000", [15, 2])])
def test_who_does_not_hear_is_ended_all_the_same(grace, signals):
    """By the watching thread: when patience ends, or at a second signal."""
    command = [sys.executable, "-c", DEAF, grace, *map(str, signals)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 143
    assert done.stderr == "error: stopped by SIGTERM; the same command goes on\n"


def test_the_first_signal_alone_is_raised():
    raised = 0
    with pytest.raises(Stopped), stoppable(lambda number: None):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raised += 1
    assert raised == 1

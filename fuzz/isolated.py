"""One command in a process of its own, with limits on time and memory; what came of it."""

import faulthandler
import json
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lillama.cli import app as cli

CPU_SECONDS, SECONDS = 10, 60  # of the processor; on the clock, for what waits without computing
SPIKE, MOST = 2 << 30, 8 << 30  # bytes more than before: a fault; refused
BROKEN = 70  # exit status: something else than an error of ours
SAID = ("stdout", "stderr", ENDED := "ended.json")  # files in which a command and its end are told
FRAME = re.compile(r'File "[^"]*/(lillama/[^"]*)", line (\d+),? in (\w+)')
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f]")
OURS = re.compile("(error|warning): ")


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        status: its exit status, 128 and more for a signal.
        fault: what is wrong with that, the same words for the same fault; None if nothing is.
        output: what it wrote on standard error.
        seconds: of the processor.
    """

    status: int
    fault: str | None
    output: str
    seconds: float


@dataclass(frozen=True)
class Call:
    """A command of lillama.

    Attributes:
        command: its words.
        folder: to run it in.
        made: folder that it makes, if it ends well.
        weights: what the weights of that folder must be; None for any.
    """

    command: str
    folder: Path
    made: str = "nothing"
    weights: Path | None = None


def status_of(command: str) -> int:
    """Run a command of lillama in this process, and return its exit status."""
    try:
        cli.main(command.split())
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def outcomes(calls: Sequence[Call]) -> Iterator[Outcome]:
    """Run commands one after the other in forks of this process; a fork ends with the first that breaks it."""
    while calls:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _work(calls)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for call in calls:
            calls = calls[1:]
            record = call.folder / ENDED
            yield _judged(call, *(json.loads(record.read_text()) if record.exists() else [code, 0, 0, True]))
            if not record.exists():
                break


def _work(calls: Sequence[Call]) -> None:
    """Be the child: run the commands, write how each ended, and leave, whatever comes."""
    try:
        size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MOST, size + MOST))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for call in calls:
            os.chdir(call.folder)
            for number, name in enumerate((os.devnull, "stdout", "stderr")):
                place = os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(place, number)
                os.close(place)
            before = resource.getrusage(resource.RUSAGE_SELF)
            kept = _kept(call)
            _limit_time(before.ru_utime + before.ru_stime)
            status = status_of(call.command)
            sys.stdout.flush()
            after = resource.getrusage(resource.RUSAGE_SELF)
            seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            grown = (after.ru_maxrss - before.ru_maxrss) * 1024
            (call.folder / ENDED).write_text(json.dumps([status, seconds, grown, _kept(call) == kept]))
        os._exit(0)
    except BaseException:  # noqa: BLE001  (what gets here is what is looked for)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(BROKEN)


def _limit_time(used: float) -> None:
    """Let a command that takes too long say where it is, and end the process."""
    faulthandler.enable()
    faulthandler.register(signal.SIGXCPU, all_threads=False, chain=True)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + CPU_SECONDS, resource.RLIM_INFINITY))


def _kept(call: Call) -> dict[Path, bytes | None]:
    """Return what a command must leave as it is: all files and folders but its own."""
    own = [call.folder / name for name in (call.made, "out.run", *SAID)]
    found = (path for path in call.folder.rglob("*") if not any(path.is_relative_to(one) for one in own))
    return {path: path.read_bytes() if path.is_file() and path.stat().st_size < SPIKE else None for path in found}


def _judged(call: Call, status: int, seconds: float, grown: int, kept: bool) -> Outcome:
    out, err = ((call.folder / name).read_bytes().decode(errors="replace") for name in SAID[:2])
    fault = _fault(status, out, err, grown) or _fault_of_files(call, status, kept)
    return Outcome(128 - status if status < 0 else status, fault, err, seconds)


def _fault_of_files(call: Call, status: int, kept: bool) -> str | None:
    made = call.folder / call.made
    if not kept:
        return "files changed that are not the command's, or left behind"
    if status and made.exists():
        return "refused, and yet the result is there"
    if (
        status == 0
        and call.weights is not None
        and (made / call.weights.name).read_bytes() != call.weights.read_bytes()
    ):
        return "other weights than from sound input"
    return None


def _fault(status: int, out: str, err: str, grown: int) -> str | None:
    """Return what is wrong, or None."""
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if status == -signal.SIGXCPU or "Timeout (" in err:
        return f"hang in {_frame(err, first=True)}"
    if status < 0:
        return f"killed by {signal.Signals(-status).name} in {_frame(err, first=True)}"
    if status == BROKEN:
        kinds = [line.partition(":")[0] for line in lines if re.match(r"[A-Za-z_][\w.]*(:|$)", line)]
        return f"{kinds[-1] if kinds else '?'} in {_frame(err)}"
    if grown > SPIKE or "error: out of memory" in err:
        return f"memory: {grown >> 20} MiB more" + "".join(f" ({line[:100]})" for line in errors)
    if "Traceback (most recent call last)" in err + out:
        return f"traceback printed, status {status}, in {_frame(err)}"
    if control := CONTROL.findall(out + err):
        return f"control characters written: {sorted(set(control))}"
    if status not in (0, 2):
        return f"status {status}: {_plain(lines[-1] if lines else 'nothing said')}"
    if status == 2 and (len(errors) != 1 or lines[-1] != errors[0] or len(errors[0]) > 2000):
        return f"status 2 with {len(errors)} lines `error:`, {len(lines)} in all, {max(map(len, lines), default=0)} characters"
    alien = [line for line in lines if not OURS.match(line)]
    return f"alien line: {_plain(alien[0])}" if alien else None


def _frame(text: str, first: bool = False) -> str:
    """Return the innermost frame of lillama in a traceback; faulthandler begins with it, and tells the main thread last."""
    found = FRAME.findall(text.rpartition("(most recent call first)")[2])
    return ":".join(found[0 if first else -1][:2]) if found else "?"


def _plain(line: str) -> str:
    return re.sub(r"\d+|'[^']*'|/\S+", "_", line)[:160]

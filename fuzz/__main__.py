"""`python -m fuzz [target ...] [--cases 20000] [--seed 0]`, or one case again: `python -m fuzz target --case 7`."""

import argparse
import gc
import io
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import torch

from fuzz import material
from fuzz.isolated import Outcome, outcomes, status_of
from fuzz.targets import TARGETS, Case, copied
from lillama.pipeline import job as job_module

TOGETHER = 50  # cases one after the other in one process, unless one breaks it


def main() -> int:
    """Run cases; exit with 1 if one of them shows a fault."""
    options = _options()
    torch.set_num_threads(1)
    job_module.matmul_rate = lambda *_: 1e9  # not measured anew for every case
    os.fsync = lambda _: None  # nothing here outlives a power cut
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        sound = Path(scratch) / "sound"
        _apart(partial(material.make, sound))
        if options.case is not None:
            return _again(Case(options.targets[0], options.seed, options.case), sound)
        _warm(sound, Path(scratch), options.targets)
        found = _run(_cases(options), sound, Path(scratch), options.jobs)
    return _told(found)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", choices=[*TARGETS, []], help="all, if none is given")
    parser.add_argument("--cases", type=int, default=20_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one again, and leave its folder behind")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args()
    options.targets = options.targets or list(TARGETS)
    return options


def _cases(options: argparse.Namespace) -> list[Case]:
    whole = sum(TARGETS[name].share for name in options.targets)
    counts = {name: max(1, round(options.cases * TARGETS[name].share / whole)) for name in options.targets}
    return [Case(name, options.seed, number) for name, count in counts.items() for number in range(count)]


def _apart(work) -> None:
    """Do something in a fork, so that this process starts no threads, which forks would lack."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("no sound input could be made")


def _warm(sound: Path, scratch: Path, targets: list[str]) -> None:
    """Import what the commands import, and see that sound input passes."""
    chosen = [TARGETS[name] for name in targets]
    calls = dict.fromkeys((folder, one) for target in chosen for folder in target.sound for one in target.commands)
    for number, (folder, command) in enumerate(calls):
        place = scratch / "warm" / str(number)
        copied(sound / folder, place)
        with chdir(place), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
            status = status_of(command)
        if status:
            raise RuntimeError(f"sound {folder}: {command}: status {status}: {said.getvalue()}")
    gc.freeze()


def _run(cases: list[Case], sound: Path, scratch: Path, jobs: int) -> dict[Case, Outcome]:
    start, found, known = time.monotonic(), {}, set[str]()
    chunks = [cases[first : first + TOGETHER] for first in range(0, len(cases), TOGETHER)]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for results in pool.imap_unordered(partial(_tried, sound, scratch), chunks):
            found |= results
            new = {result.fault: case for case, result in results.items() if result.fault and result.fault not in known}
            known |= set(new)
            for fault, case in new.items():
                sys.stderr.write(f"{fault}\n    {case}\n")
            if len(found) // 500 > (len(found) - len(results)) // 500:
                sys.stderr.write(
                    f"{len(found)} of {len(cases)}, {len(found) / (time.monotonic() - start):.1f} a second\n"
                )
    return found


def _tried(sound: Path, scratch: Path, cases: list[Case]) -> dict[Case, Outcome]:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        calls = [case.prepared(sound, Path(folder) / str(number)) for number, case in enumerate(cases)]
        return dict(zip(cases, outcomes(calls), strict=True))


def _again(case: Case, sound: Path) -> int:
    call = case.prepared(sound, Path(tempfile.mkdtemp(prefix="fuzz-case-")) / "case")
    (found,) = outcomes([call])
    print(f"cd {call.folder}; lillama {call.command}\nstatus {found.status}, {found.fault or 'right'}\n{found.output}")
    return 1 if found.fault else 0


def _told(found: dict[Case, Outcome]) -> int:
    print(f"{'target':14} {'cases':>6} {'status 0':>9} {'status 2':>9} {'faults':>7} {'CPU s each':>11}")
    for name in dict.fromkeys(case.target for case in found):
        mine = [result for case, result in found.items() if case.target == name]
        good = Counter(result.status for result in mine if not result.fault)
        faults, seconds = sum(result.fault is not None for result in mine), sum(result.seconds for result in mine)
        print(f"{name:14} {len(mine):6} {good[0]:9} {good[2]:9} {faults:7} {seconds / len(mine):11.3f}")
    first: dict[str, Case] = {}
    counts = Counter(result.fault for result in found.values() if result.fault)
    for case, result in sorted(found.items(), key=lambda item: (item[0].target, item[0].number)):
        if result.fault:
            first.setdefault(result.fault, case)
    for fault, count in counts.most_common():
        said = found[first[fault]].output.strip().splitlines()
        print(f"\n{count} x {fault}\n    {first[fault]}\n    {ascii(said[-1][:200]) if said else 'nothing said'}")
    print(f"\n{len(found)} cases, {len(counts)} distinct faults")
    return 1 if counts else 0


if __name__ == "__main__":
    sys.exit(main())

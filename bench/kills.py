"""Kill runs at random instants, go on, and compare every file of the result with that of a run that nobody stopped.

`make kills` takes some minutes: on a tiny model 20 kills each of the default recipe with every block taught, of the joint
schedule of `paper`, of a long recovery tail, and of a model in few bits. Exit status 1 where a file differs.
`tests/test_resume.py` does the same with a few kills.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
SHORT = {"calibration": {"tokens": 640, "seq_len": 32}, "keep": 0.7, "ranks": {"multiple_of": 1}}
JOBS = {  # name -> recipe that it begins with, and what is changed for a tiny model
    "default": ("default", {"distill": {"epochs": 2, "blocks": "all"}, "recover": {"epochs": 2}}),
    "paper": ("paper", {"distill": {"epochs": 4, "lr": 1e-3}, "split_gate_up": False}),
    "tail": ("default", {"distill": {"epochs": 0}, "recover": {"epochs": 8}}),
    "bits": ("default", {"distill": {"epochs": 0}, "recover": {"epochs": 1}, "storage": {"form": "plain", "bits": 3}}),
}
# What may differ from one run to the next, and why: places, and what is measured by the clock and of the process.
PLACES_AND_CLOCK = ("path", "run", "seconds", "peak_bytes")  # of lillama.json; and the digest of the card there
CLOCK_LINE = re.compile(rb"^- [^\n]*, peak memory [^;\n]*;", re.MULTILINE)  # of the card


def outcome(out: Path) -> dict[str, bytes]:
    """Return name -> content of every file of a result, without what may differ."""
    found = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    value = json.loads(found["lillama.json"])
    value = {key: item for key, item in value.items() if key not in PLACES_AND_CLOCK}
    del value["files"]["README.md"]
    found["lillama.json"] = json.dumps(value).encode()
    found["README.md"] = CLOCK_LINE.sub(b"", found["README.md"])
    return found


@dataclass
class Worker:
    """Runs jobs in processes that can be killed: tests/killable.py imports once, and forks a child for each."""

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


@contextlib.contextmanager
def worker() -> Iterator[Worker]:
    command = [sys.executable, TESTS / "killable.py"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield Worker(process)
        process.stdin.close()


def later(seconds: float) -> Callable[[], bool]:
    """Return a condition that holds after some seconds."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def stage(run: Path) -> str:
    """Return how far a killed run had come."""
    marks = {"metrics.json": "finished once", "recovered/log.json": "result", "recovery": "tail", "joint": "joint",
             "blocks": "blocks", "allocation.json": "ranks", "spectra.safetensors": "ranks",
             "calibration": "tokens", "run.json": "begun"}  # fmt: skip
    return next((name for mark, name in marks.items() if (run / mark).exists()), "before")


def tried(runner: Worker, job: dict, folder: Path, kills: int, chance: random.Random) -> tuple[Counter, list[str]]:
    """Kill a job so many times, in as many runs as that takes; return where, and the files that differ in the end."""
    runner.job = job | {"out": str(folder / "whole")}
    begin = time.monotonic()
    assert runner.run() == 0, "the job itself fails"
    whole, wanted = time.monotonic() - begin, outcome(folder / "whole")
    where, different, number = Counter[str](), list[str](), 0
    while where.total() < kills:
        number += 1
        out = folder / f"out-{number}"
        runner.job = job | {"out": str(out)}
        while where.total() < kills and runner.run(later(chance.uniform(0, whole))) == signal.SIGKILL:
            where[stage(folder / f"{out.name}.run")] += 1
            if out.exists():
                different += _differences(out, wanted)
        if not out.exists() or where.total() == kills:
            assert runner.run() == 0, f"{out}: the resumed run fails"
        different += _differences(out, wanted)
        left = {path.name for path in folder.iterdir() if path.name.startswith(".")}
        different += [f"{name} is left" for name in left]
    return where, different


def _differences(out: Path, wanted: dict[str, bytes]) -> list[str]:
    found = outcome(out)
    return [f"{out.name}/{name}" for name in sorted(found.keys() | wanted) if found.get(name) != wanted.get(name)]


def jobs(folder: Path) -> dict[str, dict]:
    """Make a tiny model and a text; return name -> job."""
    sys.path.append(str(TESTS))
    from conftest import save_model
    from lillama.recipes.recipe import load_recipe

    model, text, chance = save_model(folder / "model", num_hidden_layers=3), folder / "words.txt", random.Random(0)
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(1, 6))) for _ in range(40)]
    text.write_text(" ".join(chance.choices(words, k=2000))[:6000], encoding="utf-8")
    sources = {"calibration": {**SHORT["calibration"], "sources": [{"path": str(text)}]}}
    recipes = {name: load_recipe(base, SHORT | sources | changes) for name, (base, changes) in JOBS.items()}
    return {
        name: {"model": str(model), "recipe": recipe.as_dict(), "texts": [str(text)], "snapshot_seconds": 0.05}
        for name, recipe in recipes.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    given, bad = parser.parse_args(), 0
    with tempfile.TemporaryDirectory(prefix="lillama-kills-") as place, worker() as runner:
        for name, job in jobs(Path(place)).items():
            if name not in given.jobs:
                continue
            folder = Path(place) / name
            folder.mkdir()
            where, different = tried(runner, job, folder, given.kills, random.Random(f"{name} {given.seed}"))
            stages = ", ".join(f"{stage} {count}" for stage, count in where.most_common())
            print(f"{name}: {where.total()} kills ({stages}); {len(different)} files differ {different}", flush=True)
            bad += len(different)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())

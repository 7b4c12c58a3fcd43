"""Damaged input of every kind ends with success or one clear line; and what does not is seen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CASES = 200

WRONG = r"""
import json, os, sys, tempfile
from pathlib import Path
from fuzz import isolated
from lillama.cli import app as cli

def endless():
    while True: pass

def error(text, status=2):
    sys.stderr.write(text)
    return status

WAYS = {
    "right": lambda: 0, "refused": lambda: error("warning: x\nerror: y\n"), "raises": lambda: json.loads("{"),
    "crashes": lambda: os.abort(), "hangs": endless, "swells": lambda: len(b"x" * (isolated.SPIKE + (100 << 20))) * 0,
    "silent": lambda: 2, "two lines": lambda: error("error: x\nerror: y\n"), "alien": lambda: error("x\n", 0),
    "escapes": lambda: error("error: \x1b[31m\n"), "fails": lambda: error("error: x\n", 1),
}
cli.main = lambda words: sys.exit(WAYS[" ".join(words)]())
isolated.CPU_SECONDS, isolated.SPIKE = 1, 100 << 20
with tempfile.TemporaryDirectory() as scratch:
    calls = [isolated.Call(way, Path(scratch) / way) for way in WAYS]
    for call in calls:
        call.folder.mkdir()
    print(json.dumps({call.command: found.fault for call, found in zip(calls, isolated.outcomes(calls), strict=True)}))
"""

SAME = r"""
import hashlib, sys, tempfile
from pathlib import Path
from fuzz.targets import TARGETS, Case
with tempfile.TemporaryDirectory() as scratch:
    sound = Path(scratch) / "sound"
    (sound / "llama" / "model").mkdir(parents=True)
    (sound / "llama" / "model" / "config.json").write_text('{"a": [1, 2.5, {"b": null}], "c": "d"}')
    found = []
    for turn in range(2):
        cases = [Case("config", seed, number) for seed in range(2) for number in range(30)]
        calls = [case.prepared(sound, Path(scratch) / f"{turn}-{place}") for place, case in enumerate(cases)]
        files = [call.folder / "model" / "config.json" for call in calls]
        small = [file.is_file() and file.stat().st_size < 1 << 20 for file in files]
        contents = [file.read_bytes() if read else None for file, read in zip(files, small)]
        found.append([(call.command, content) for call, content in zip(calls, contents)])
    assert found[0] == found[1]
    assert len({content for _, content in found[0]}) > 30
"""


def python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def faults() -> dict[str, str | None]:
    """What is said of a command that ends in each of many ways."""
    done = python("-c", WRONG)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("raises", "json.decoder.JSONDecodeError in"),
        ("crashes", "killed by SIGABRT"),
        ("hangs", "hang in"),
        ("swells", "memory: "),
        ("silent", "status 2 with 0 lines"),
        ("two lines", "status 2 with 2 lines"),
        ("alien", "alien line: x"),
        ("escapes", r"control characters written: ['\x1b']"),
        ("fails", "status 1: error: x"),
    ],
)
def test_each_kind_of_fault_is_seen(faults: dict[str, str | None], way: str, words: str) -> None:
    assert (faults[way] or "").startswith(words)


def test_what_is_right_is_no_fault(faults: dict[str, str | None]) -> None:
    assert faults["right"] is None and faults["refused"] is None


def test_a_case_is_the_same_again() -> None:
    done = python("-c", SAME)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_damaged_input_ends_with_success_or_one_clear_line() -> None:
    done = python("-m", "fuzz", "--cases", str(CASES), "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr

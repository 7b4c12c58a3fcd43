"""What demo/real.sh and its target run: stand-ins for the commands note how they are called."""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from lillama.cli.app import app

ROOT = Path(__file__).parents[2]
MODEL, OUT, PAGE = "models/a folder", "demo/out/smollm2-0.80", "demo/out/report-real.html"
NOTE = """#!/bin/sh
(printf %s "${0##*/}"; printf '\\t%s' "$@"; echo) >> calls
"""
STAND_INS = {
    "python": f'{NOTE}[ "$1" != bench/models.py ] || echo "{MODEL}"\n',
    "lillama": f'{NOTE}[ "$1" != compress ] || [ ! -e fails ] || exit 2\n',
    "uname": "#!/bin/sh\necho Linux\n",
}


@dataclass(frozen=True)
class Ran:
    """What the script did: its exit status, and each call of a command, as words."""

    status: int
    calls: list[list[str]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that holds the script and the stand-ins alone."""
    (tmp_path / "demo").mkdir()
    shutil.copy(ROOT / "demo" / "real.sh", tmp_path / "demo")
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(text, encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


@pytest.fixture
def real(checkout: Path) -> Callable[..., Ran]:
    """Return a function that runs the script in an environment without a display, but for what is given."""

    def run(**environment: str) -> Ran:
        path = f"{checkout / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "demo/real.sh"], cwd=checkout, env={"PATH": path} | environment, capture_output=True, check=False
        )
        calls = (checkout / "calls").read_text(encoding="utf-8").splitlines()
        return Ran(done.returncode, [call.split("\t") for call in calls])

    return run


def test_the_demo_fetches_compresses_chats_and_reports(real: Callable[..., Ran]) -> None:
    ran = real()
    assert ran.status == 0
    compressed = ran.calls.pop(1)
    assert ran.calls == [
        ["python", "bench/models.py", "smollm2-135m"],
        ["python", "demo/chat.py", MODEL, OUT],
        ["lillama", "report", OUT, "--out", PAGE],
    ]
    _, bound, _ = app.parse_args(compressed[1:], exit_on_error=False, print_error=False)
    asked = bound.arguments
    assert (asked["model"], asked["out"], asked["time"], asked["text"]) == (
        MODEL,
        Path(OUT),
        "20m",
        [Path("demo/text.txt")],
    )
    assert asked["overrides"].keep == 0.8


@pytest.mark.parametrize("display", ["DISPLAY", "WAYLAND_DISPLAY"])
def test_the_report_is_opened_where_there_is_a_display(display: str, real: Callable[..., Ran], checkout: Path) -> None:
    ran = real(**{display: ":0"})
    assert ran.status == 0 and ran.calls[-1] == ["python", "-m", "webbrowser", f"file://{checkout.resolve() / PAGE}"]


def test_a_stopped_run_goes_on_and_a_finished_one_is_made_anew(real: Callable[..., Ran], checkout: Path) -> None:
    run, other, toy = (checkout / f"{OUT}-10m.run", checkout / f"{OUT}-20m.run", checkout / "demo/out/keep-0.80")
    for folder in (run, other, toy):
        folder.mkdir(parents=True)
    words = real(TIME="10m").calls[1]
    assert words[words.index("--time") + 1] == "10m" and words[words.index("--run") + 1] == f"{OUT}-10m.run"
    assert run.is_dir()

    (checkout / OUT).mkdir()
    real(TIME="10m")
    assert not run.exists() and not (checkout / OUT).exists()
    assert other.is_dir() and toy.is_dir(), "nothing else is lost"


def test_no_chat_follows_a_compression_that_failed(real: Callable[..., Ran], checkout: Path) -> None:
    (checkout / "fails").touch()
    ran = real()
    assert ran.status == 2 and [call[1] for call in ran.calls] == ["bench/models.py", "compress"]


@pytest.mark.parametrize(("target", "extras"), [("demo", ["[dev]"]), ("demo-real", ["[dev]", "[bench]"])])
def test_the_toy_demo_installs_no_more_than_before(target: str, extras: list[str], tmp_path: Path) -> None:
    command = ["make", "-n", target, "TIME=10m", f"VENV={tmp_path}"]
    path = {"PATH": os.environ["PATH"]}  # and nothing of a `make test` around this
    told = subprocess.run(command, cwd=ROOT, env=path, capture_output=True, text=True, check=True).stdout
    assert [extra for extra in ("[dev]", "[bench]") if f'-e ".{extra}"' in told] == extras
    assert ('TIME="10m" bash demo/real.sh' in told) == (target == "demo-real")

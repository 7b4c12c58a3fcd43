"""What is printed is what it says: names of others neither style a table nor move a terminal."""

import json
import logging
import sys
from io import BytesIO, TextIOWrapper

import pytest
from rich.console import Console
from rich.progress import Progress as Bars
from rich.table import Table

from lillama.cli import app as cli
from lillama.cli.output import Drawing, OneLine, print_tables, say, show
from lillama.errors import LillamaError, RecipeError, plain
from lillama.system.progress import Progress

HOSTILE = "a\x1b[2J\x1b]0;title\x07b\r\u202ec\x9b1m\udcff"
ESCAPED = r"a\x1b[2J\x1b]0;title\x07b\r\u202ec\x9b1m\udcff"


@pytest.mark.parametrize(
    "name", ["novel[red].txt", "[/b]", "[bold]x[/bold]", ":warning:", "Qui\u00a0?", "日本 é", "\u200dx\u200c", "a\\b"]
)
def test_names_that_print_stay_as_they_are(name, capsys):
    assert plain(name) == name
    table = Table(f"<{name}>", title=name)
    table.add_row(name)
    print_tables(table)
    say(name)
    printed = capsys.readouterr().out
    assert printed.count(name) >= 4 and printed.endswith(f"{name}\n")


def test_what_does_not_print_is_escaped_everywhere(capsys, caplog):
    assert plain(HOSTILE) == ESCAPED and plain("a\nb") == "a\\nb"
    table = Table(f"{HOSTILE}1", title=f"{HOSTILE}2")
    table.add_row(f"{HOSTILE}3\nsecond line")
    print_tables(table)
    say(f"{HOSTILE}4")
    printed = capsys.readouterr().out
    assert all(f"{ESCAPED}{number}" in printed for number in (1, 2, 3, 4))
    assert "second line" in printed and HOSTILE[:3] not in printed
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "%s\nnext", (HOSTILE,), None)
    assert OneLine("warning: %(message)s").format(record) == f"warning: {ESCAPED} next".replace("\\r", " ")


def test_json_is_ascii_and_says_the_same(capsys):
    value = {"name": HOSTILE, "é": "日本"}
    show(value, True, lambda: None)
    printed = capsys.readouterr().out
    assert printed.isascii() and json.loads(printed) == value and "\x1b" not in printed


def test_bars_show_names_as_they_are():
    console = Console(record=True, width=200)
    bars = Bars(console=console)
    draw = Drawing(bars)
    draw(Progress("calibration", 0, 2, f"[/b]{HOSTILE}"))
    draw(Progress("taught", 1, 2, f"[red]{HOSTILE}"))
    assert bars.tasks[0].fields["note"] == f"[/b]{ESCAPED}"
    assert f"[red]{ESCAPED}" in console.export_text()


def test_errors_are_one_line_of_what_prints(capsys):
    def work():
        raise LillamaError(f"[red] {HOSTILE}\nnext")

    assert cli.run(work) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: [red] a\\x1b") and printed.endswith(" next\n") and printed.count("\n") == 1
    assert "\x1b" not in printed and "\u202e" not in printed


def test_of_a_long_value_an_error_shows_little(capsys):
    def work():
        raise LillamaError(f"r.yaml: keep is {'x' * 100_000}: it must be a number")

    assert cli.run(work) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: r.yaml: keep is xxx") and printed.endswith("x: it must be a number\n")
    assert len(printed) < 1100


def test_outputs_that_know_few_letters_get_escapes(monkeypatch):
    out = TextIOWrapper(BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    say("café")
    out.flush()
    assert out.buffer.getvalue().endswith(b"caf\\xe9\n")  # pyright: ignore[reportAttributeAccessIssue]


def test_arguments_that_are_not_utf8_are_refused(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["plan", str(tmp_path / "caf\udce9")])
    printed = capsys.readouterr().err
    assert exit_.value.code == RecipeError.exit_status and printed.count("\n") == 1
    assert printed.startswith("error: ") and r"caf\udce9: this name is not UTF-8" in printed

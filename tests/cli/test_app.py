"""The command line: its options reach the library, its JSON is a contract, its bars are for terminals alone."""

import json
import logging
import os
import pty
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress as Bars

from lillama import __all__ as names
from lillama.cli import output as cli_output
from lillama.cli.app import main
from lillama.cli.output import Drawing
from lillama.errors import RecipeError
from lillama.pipeline import api as compression
from lillama.pipeline.api import compress
from lillama.recipes.options import Machine, Overrides, OverridesDict, parse_size
from lillama.system.progress import Progress


def run(*words: object) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    assert exit_.value.code == 0


@pytest.fixture
def recipe(quick, tmp_path) -> Path:
    file = tmp_path / "quick.yaml"
    file.write_text(quick(distill={"epochs": 1}).as_yaml(), encoding="utf-8")
    return file


def test_compress_prints_a_table_and_the_line_that_loads(tiny, recipe, text, tmp_path, capsys):
    out = tmp_path / "it's out"
    run("compress", tiny, out, "--recipe", recipe, "--keep", "0.7", "--text", text)
    printed = capsys.readouterr()
    assert printed.err == ""
    for word in ("parameters", "bytes", "perplexity, words", "bits per byte, words", "time", "peak memory"):
        assert word in printed.out
    line = printed.out.strip().splitlines()[-1]
    assert line.startswith("import lillama, transformers; model = transformers.AutoModelForCausalLM.from_pretrained(")
    scope: dict = {}
    exec(line, scope)
    assert scope["model"].num_parameters() == json.loads((out / "lillama.json").read_text())["params"]["kept"]


def test_compress_json(tiny, recipe, text, tmp_path, capsys):
    run("compress", tiny, tmp_path / "out", "--recipe", recipe, "--text", text, "--json", "--run", tmp_path / "run")
    value = json.loads(capsys.readouterr().out)
    assert value["version"] == 1 and value["path"] == str(tmp_path / "out") and value["run"] == str(tmp_path / "run")
    assert value["params"]["kept"] <= 0.7 * value["params"]["dense"]
    assert set(value["texts"][0]) == {"name", "tokens", "before", "after"}
    assert value["seconds"] > 0 and value["peak_bytes"] > 0


def test_evaluate_json_is_the_contract(tiny, text, capsys):
    run("evaluate", tiny, "--text", text, text.parent / "words.txt", "--seq-len", "32", "--json")
    value = json.loads(capsys.readouterr().out)
    assert set(value) == {"version", "texts"} and value["version"] == 1
    assert set(value["texts"][0]) == {"name", "tokens", "perplexity", "bits_per_byte"}
    run("evaluate", tiny, "--text", text, "--seq-len", "32")
    assert f"{value['texts'][0]['perplexity']:.3f}" in capsys.readouterr().out


def test_evaluate_of_a_result_agrees_with_the_table(tiny, recipe, text, tmp_path, capsys):
    run("compress", tiny, tmp_path / "out", "--recipe", recipe, "--text", text, "--json")
    after = json.loads(capsys.readouterr().out)["texts"][0]["after"]
    run("evaluate", tmp_path / "out", "--text", text, "--json")
    (score,) = json.loads(capsys.readouterr().out)["texts"]
    assert {key: score[key] for key in after} == after


def test_plan_prints_ranks_or_json(tiny, recipe, capsys):
    run("plan", tiny, "--recipe", recipe)
    printed = capsys.readouterr().out
    assert "self_attn.q_proj (32 x 32)" in printed and "kept" in printed and "about" in printed
    run("plan", tiny, "--recipe", recipe, "--json")
    assert json.loads(capsys.readouterr().out)["version"] == 1


def test_export_prints_where(tiny, quick, tmp_path, capsys):
    compress(tiny, tmp_path / "out", recipe=quick(distill={"epochs": 0}))
    run("export", tmp_path / "out", tmp_path / "dense", "--format", "dense")
    assert capsys.readouterr().out == f"{tmp_path / 'dense'}\n"
    assert (tmp_path / "dense" / "model.safetensors").is_file()


def test_every_option_reaches_the_library(monkeypatch, tmp_path):
    given = {}

    def work(model, out, **options):
        given.update(options, model=model, out=out)
        raise RecipeError("enough")

    monkeypatch.setattr(compression, "compress", work)
    words = """org/model out --keep 0.5 --recipe paper --calibration a.txt b.txt --tokens 7 --seq-len 8 --scope blocks
        --targets mlp.* self_attn.* --ignore *.0.* --seed 4 --plan p.json --text x.txt y.txt --run r --restart
        --device cpu --micro-batch 3 --activation-memory 4GB --shard-size 1MiB --bytes 1MB --max-loss 0.1 --time 20m --bits 8
        --no-recover --compile --trust-remote-code"""
    with pytest.raises(SystemExit):
        main(["compress", *words.split()])
    report = given.pop("report")
    assert callable(report)
    assert given == {
        "model": "org/model",
        "out": Path("out"),
        "keep": 0.5,
        "recipe": "paper",
        "calibration": ("a.txt", "b.txt"),
        "tokens": 7,
        "seq_len": 8,
        "scope": "blocks",
        "targets": ("mlp.*", "self_attn.*"),
        "ignore": ("*.0.*",),
        "seed": 4,
        "rank_plan": Path("p.json"),
        "texts": [Path("x.txt"), Path("y.txt")],
        "run": Path("r"),
        "restart": True,
        "machine": Machine("cpu", 3, 4 * 10**9, 2**20, True),
        "nbytes": 10**6,
        "max_loss": 0.1,
        "time": "20m",
        "bits": 8,
        "recover": False,
        "trust_remote_code": True,
    }


def test_defaults_are_left_to_the_recipe(monkeypatch):
    given = {}

    def work(model, out, **options):
        given.update(options)
        raise RecipeError("enough")

    monkeypatch.setattr(compression, "compress", work)
    with pytest.raises(SystemExit):
        main(["compress", "m", "out"])
    assert {k: v for k, v in given.items() if v is not None} == {
        "texts": (),
        "restart": False,
        "machine": Machine(),
        "report": given["report"],
        "trust_remote_code": False,
    }


def test_plan_takes_what_says_where_a_run_lies(tiny, recipe, tmp_path, capsys):
    run("plan", tiny, "--recipe", recipe, "--run", tmp_path / "run", "--restart", "--json")
    assert json.loads(capsys.readouterr().out)["version"] == 1 and not (tmp_path / "run").exists()


def test_arguments_in_python_are_the_overrides():
    assert list(OverridesDict.__annotations__) == [field.name for field in fields(Overrides)]
    assert Overrides.of(keep=0.5, targets="mlp.*", calibration=[Path("a.txt"), "b.txt"]) == Overrides(
        keep=0.5, targets=("mlp.*",), calibration=("a.txt", "b.txt")
    )
    with pytest.raises(TypeError, match="kep"):
        Overrides.of(kep=0.5)  # pyright: ignore[reportCallIssue]


def test_help_names_commands_and_options(capsys):
    run("--help")
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("compress", "plan", "evaluate", "export"))
    for command in ("compress", "plan"):
        run(command, "--help")
        printed = capsys.readouterr().out
        for option in (
            "--keep",
            "--recipe",
            "--calibration",
            "--tokens",
            "--seq-len",
            "--scope",
            "--targets",
            "--ignore",
            "--seed",
            "--device",
        ):
            assert option in printed, (command, option)
        for option in ("--run", "--restart"):  # which `plan` takes as well, but does nothing with
            assert (option in printed) == (command == "compress"), (command, option)
    run("--version")
    assert re.search(r"\d+\.\d+\.\d+", capsys.readouterr().out)
    assert {"compress", "plan", "perplexity", "export"} <= set(names)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4GB", 4 * 10**9),
        ("512 MiB", 512 * 2**20),
        ("1.5kb", 1500),
        ("7", 7),
        ("7B", 7),
        ("2T", 2 * 10**12),
        ("0.1TB", 10**11),
        ("4GiB", 4 * 2**30),
        ("400KB", 400_000),
    ],
)
def test_sizes(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4XB", "four", "1e9", "4GBs", "9" * 400, "1." + "0" * 10**6])
def test_no_sizes(text):
    with pytest.raises(RecipeError, match="give bytes"):
        parse_size(text)


def test_bars_are_drawn_nested_and_begin_anew():
    now = iter(range(100))
    bars = Bars(console=Console(quiet=True))
    draw = Drawing(bars)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli_output.time, "monotonic", lambda: next(now))
        draw(Progress("blocks", 0, 2, "layers.0"))
        draw(Progress("steps", 1, 4, "layers.0", 100, 0.5))
        draw(Progress("steps", 4, 4, "layers.0", 400, 0.25))
        blocks, steps = bars.tasks
        assert (steps.completed, steps.total) == (4, 4)
        assert steps.fields["note"] == "layers.0  loss 0.25000  300 tokens/s"
        draw(Progress("blocks", 1, 2, "layers.1"))
        draw(Progress("steps", 1, 4, "layers.1", 100, 0.75))
        assert (blocks.completed, blocks.total, blocks.fields["note"]) == (1, 2, "layers.1")
        assert steps.completed == 1 and steps.fields["note"] == "layers.1  loss 0.75000"
    assert [task.description for task in bars.tasks] == ["blocks", "  steps"]


@pytest.mark.slow
def test_bars_on_a_terminal(tiny, recipe, text, tmp_path):
    command = [
        sys.executable,
        "-m",
        "lillama.cli.app",
        "compress",
        tiny,
        tmp_path / "out",
        "--recipe",
        recipe,
        "--text",
        text,
    ]
    main_end, other_end = pty.openpty()
    os.set_blocking(main_end, True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=other_end, env=os.environ | {"TERM": "xterm"})
    os.close(other_end)
    drawn = b""
    while True:
        try:
            drawn += os.read(main_end, 4096)
        except OSError:  # the other end is closed
            break
    os.close(main_end)
    table, _ = process.communicate()
    assert process.returncode == 0
    for word in (b"blocks", b"steps", b"loss", b"held-out loss", b"tokens/s", b"3/3", b"0:00:00", b"perplexity"):
        assert word in drawn, word
    assert b"parameters" in table and b"tokens/s" not in table


def test_warnings_are_shown_above_the_bars(tiny, recipe, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    run("compress", tiny, tmp_path / "out", "--recipe", recipe, "--tokens", "32")
    error = capsys.readouterr().err
    assert "one calibration sequence only" in " ".join(error.split()) and "error:" not in error

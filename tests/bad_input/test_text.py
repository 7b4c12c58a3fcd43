"""Texts, tokenizers and recipes that cannot be used, by the command line: one line, status 2, nothing half-written."""

import json
import re
import shutil

import pytest
import torch
from tokenizers import Tokenizer

from lillama.calibration.pack import CalibrationSet
from lillama.cli.app import main
from lillama.model.tokenizer import load_tokenizer
from lillama.pipeline.api import compress


def refused(capsys, *words: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in words])
    printed = capsys.readouterr()
    assert exit_.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
    return printed.err


@pytest.fixture
def larger(tiny, tmp_path):
    """A model whose tokenizer has got a token that it has no embedding for, and a text that holds it."""
    folder = shutil.copytree(tiny, tmp_path / "larger")
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    (tmp_path / "new.txt").write_text("some <|new|> words " * 40)
    return folder


@pytest.fixture
def recipe(quick, tmp_path):
    file = tmp_path / "quick.yaml"
    file.write_text(quick(distill={"epochs": 0}).as_yaml(), encoding="utf-8")
    return file


def test_a_token_without_an_embedding_is_named_by_every_command(larger, tiny, recipe, text, tmp_path, capsys):
    new, out = tmp_path / "new.txt", tmp_path / "out"
    named = r"token '<\|new\|>' has the id 258, but the model has 258 embeddings; .*resize"
    for words in (
        ["compress", larger, out, "--recipe", recipe, "--calibration", new],
        ["compress", larger, out, "--recipe", recipe, "--calibration", text, "--text", new],
        ["evaluate", larger, "--text", new],
        ["evaluate", larger, "--text", new, "--against", tiny],
    ):
        assert re.search(rf"new(\.txt)?: {named}", refused(capsys, *words)), words
    rules = {"name": "own", "files": ["pairs.csv"], "good": "right", "bad": "wrong", "pair": ["id"], "average": [["id"]],
             "groups": {}}  # fmt: skip
    (tmp_path / "own.yaml").write_text(json.dumps(rules))
    (tmp_path / "pairs.csv").write_text("id,right,wrong\n1,a <|new|>,b\n")
    assert re.search(named, refused(capsys, "probe", larger, "--benchmark", tmp_path / "own.yaml"))
    assert not out.exists()
    main_ok = compress(larger, out, recipe=str(recipe), calibration=str(text))  # a token that is never met harms nobody
    assert main_ok.path == out


def test_a_run_goes_on_with_a_tokenizer_that_would_cut_texts(tiny, quick, text, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.enable_truncation(16)
    core.enable_padding(length=16)
    core.save(str(folder / "tokenizer.json"))
    wanted = compress(tiny, tmp_path / "wanted", recipe=quick(distill={"epochs": 0}))
    options = {"recipe": quick(distill={"epochs": 0})}
    first = compress(folder, tmp_path / "out", **options)
    again = compress(
        folder, tmp_path / "out", texts=[text], **options
    )  # a call that tokenises before the run is opened
    ids = [CalibrationSet.load(result.run / "calibration").ids for result in (wanted, first, again)]
    assert torch.equal(ids[0], ids[1]) and torch.equal(ids[0], ids[2])


@pytest.mark.parametrize("value", ["[]", "null", "5", '{"temperature": "hot"}'])
def test_a_model_writes_its_own_text_whatever_its_generation_config(make_model, recipe, tmp_path, capsys, value):
    model = make_model()
    (model / "generation_config.json").write_text(value)
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in ("compress", model, tmp_path / "out", "--recipe", recipe, "--calibration", "self",
                                     "--tokens", "128", "--seq-len", "32")])  # fmt: skip
    assert exit_.value.code == 0, capsys.readouterr().err


def test_tables_show_names_that_look_like_markup(tiny, text, tmp_path, capsys):
    novel = tmp_path / "novel[red].txt"
    novel.write_text(text.read_text()[:600])
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", str(tiny), "--text", str(novel), "--seq-len", "32"])
    assert exit_.value.code == 0 and "novel[red]" in capsys.readouterr().out


def test_a_folder_that_looks_like_markup_is_an_out(tiny, recipe, text, tmp_path, capsys):
    out = tmp_path / "[" / "b]out"  # `[/b]` closes what nothing opened
    out.parent.mkdir()
    with pytest.raises(SystemExit) as exit_:
        main(["compress", str(tiny), str(out), "--recipe", str(recipe), "--calibration", str(text)])
    printed = capsys.readouterr()
    assert exit_.value.code == 0 and (out / "config.json").is_file(), printed.err
    assert "[/b]out" in printed.out


RECIPES = {
    "anchors": ("keep: [&a [x, x, x, x, x, x, x, x, x]" + "".join(
        f", &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefgh", "bcdefghi", strict=True)) + "]",
        "aliases"),
    "deep": ("keep: " + "[" * 3000, "nested more than"),
    "digits": ("bytes: " + "9" * 5000, "is no int"),
    "date": ("keep: 2024-13-45", "is no timestamp"),
    "number": ("keep: !!int abc", "is no int"),
    "Python": ("keep: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    "half of a pair": ('targets: ["\\ud83d"]', "line 1, column 11: half of a surrogate pair"),
    "strategy as a key": ("svd: 1", "unknown key svd"),
    "number as a key": ("1: 2", "unknown key 1"),
    "list as a key": ("? [keep]\n: 1", "unhashable|is no map"),
    "long value": ("targets: {" + ", ".join(f"k{n}: v" for n in range(3000)) + "}", r"targets is \{'k0': 'v'.*: "),
}  # fmt: skip


@pytest.mark.parametrize("fault", RECIPES)
def test_recipes_that_are_none(tiny, tmp_path, capsys, fault):
    content, match = RECIPES[fault]
    (tmp_path / "r.yaml").write_text(content, encoding="utf-8")
    error = refused(capsys, "plan", tiny, "--recipe", tmp_path / "r.yaml")
    assert re.search(match, error) and len(error) < 600, error[:600]

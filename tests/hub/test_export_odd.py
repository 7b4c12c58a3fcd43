"""Exports of odd folders: one line that names the file, nothing waited for, nothing half-written, nothing from outside."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.hub.conftest import Saved

from lillama.cli.app import main
from lillama.hub.export import LARGEST_README, export


@pytest.fixture
def model(saved: Saved, tmp_path: Path) -> Path:
    """A compressed model of its own, with a README and a tokenizer."""
    shutil.copytree(saved.folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "README.md").write_text("# Card\n")
    return tmp_path / "model"


def pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def folder(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def device(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to("/dev/zero")


def file_at(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.write_text("x")


REFUSED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "MODEL is a file": (lambda m, out: file_at(m), "config.json"),
    "MODEL is a pipe": (lambda m, out: (shutil.rmtree(m), pipe(m)), "config.json"),
    "MODEL is a link to nothing": (lambda m, out: (shutil.rmtree(m), m.symlink_to("gone")), "config.json"),
    "config is a pipe": (lambda m, out: pipe(m / "config.json"), "config.json"),
    "config is a folder": (lambda m, out: folder(m / "config.json"), "config.json"),
    "config is a device": (lambda m, out: device(m / "config.json"), "config.json"),
    "config is no text": (lambda m, out: (m / "config.json").write_bytes(b"\xff\xfe{"), "config.json"),
    "weights are a pipe": (lambda m, out: pipe(m / "model.safetensors"), "model.safetensors"),
    "weights are a folder": (lambda m, out: folder(m / "model.safetensors"), "model"),
    "weights are a device": (lambda m, out: device(m / "model.safetensors"), "model.safetensors"),
    "weights are cut": (lambda m, out: (m / "model.safetensors").write_bytes(b"0" * 100), "model.safetensors"),
    "an adapter lies beside": (
        lambda m, out: (m / "adapter_config.json").write_text("{}"),
        "an adapter lies in this folder",
    ),
    "OUT is a file": (lambda m, out: file_at(out), "exists already"),
    "OUT is a folder": (lambda m, out: out.mkdir(), "exists already"),
    "OUT is a pipe": (lambda m, out: pipe(out), "exists already"),
}


@pytest.mark.parametrize("format", ["dense", "portable"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_named_in_one_line(
    case: str, format: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = REFUSED[case]
    change(model, tmp_path / "out")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SystemExit) as exit_:
        main(["export", str(model), str(tmp_path / "out"), "--format", format])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2 and line.startswith("error: ") and message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_no_folder_is_made_below_a_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as exit_:
        main(["export", str(model), str(tmp_path / "file" / "out"), "--format", "dense"])
    assert exit_.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1
    assert (tmp_path / "file").read_text() == "mine"


READMES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (pipe, ""),
    "folder": (folder, ""),
    "device": (device, ""),
    "empty": (lambda file: file.write_bytes(b""), ""),
    "no text": (lambda file: file.write_bytes(b"# \xff\xfe"), "it is not UTF-8"),
    "huge": (lambda file: file.write_bytes(b"#" * (LARGEST_README + 1)), "it is longer than"),
    "link": (
        lambda file: (file.with_name("x").parent.parent.joinpath("secret").write_text("SECRET"),
                      file.unlink(), file.symlink_to("../secret")), "it is a link",
    ),
}  # fmt: skip


@pytest.mark.parametrize("format", ["dense", "portable"])
@pytest.mark.parametrize("case", READMES)
def test_a_readme_that_cannot_be_read_is_made_anew(
    case: str, format: str, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, reason = READMES[case]
    change(model / "README.md")
    export(model, tmp_path / "out", format)  # pyright: ignore[reportArgumentType]
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# model\n") and "## How to load it" in text and "SECRET" not in text
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == bool(reason) and all(reason in line for line in warnings)


@pytest.mark.parametrize("format", ["dense", "portable"])
def test_an_export_may_lie_in_the_model_and_does_not_hold_itself(format: str, model: Path) -> None:
    before = {path.name for path in model.iterdir()}
    export(model, model / "out", format)  # pyright: ignore[reportArgumentType]
    assert {path.name for path in model.iterdir()} == before | {"out"}
    inner = {path.name for path in (model / "out").iterdir()}
    assert inner == before | ({"modeling_lillama.py"} if format == "portable" else set())
    export(model, model / "again", format)  # pyright: ignore[reportArgumentType]
    assert {path.name for path in (model / "again").iterdir()} == inner


@pytest.mark.parametrize("format", ["dense", "portable"])
def test_other_files_of_the_folder_stay_behind(format: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("SECRET")
    (model / "notes.txt").symlink_to("../secret")
    for name in ("pytorch_model.bin", "run.py", "lillama.json", "adapter_model.safetensors", "other.safetensors"):
        (model / name).write_bytes(b"0")
    os.mkfifo(model / "vocab.txt")
    export(model, tmp_path / "out", format)  # pyright: ignore[reportArgumentType]
    expected = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    code = {"modeling_lillama.py"} if format == "portable" else set()
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected | code


@pytest.mark.parametrize("format", ["dense", "portable"])
def test_an_index_that_does_not_count_stays_behind(format: str, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "gone.safetensors"}}')
    export(model, tmp_path / "out", format)  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_warnings_are_lines_of_ours(model: Path, tmp_path: Path) -> None:
    """Names come from others: nothing of them moves the terminal."""
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {"\x1b[2Jmodel.x": torch.zeros(1)}, model / "model.safetensors", metadata={"format": "pt"})
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "lillama.cli.app",
        "export",
        str(model),
        str(tmp_path / "out"),
        "--format",
    ]
    done = subprocess.run([*command, "dense"], capture_output=True, text=True, check=False)
    (line,) = [line for line in done.stderr.splitlines() if "stored tensors" in line]
    assert done.returncode == 0 and line.startswith("warning: ") and line.endswith("left out: \\x1b[2Jmodel.x")

"""Every script in `examples/` runs, is short, and says how it is called."""

import runpy
import shutil
import sys
import warnings
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_example(
    script: Path, tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = text.read_text(encoding="utf-8")
    parts = tmp_path / "text.txt"
    parts.write_text("\n\n".join(words[start : start + 200] for start in range(0, len(words), 200)), encoding="utf-8")
    model = shutil.copytree(tiny, tmp_path / "model")
    share = ["0.9"] if script.stem == "budget_in_bytes" else []
    monkeypatch.setattr(sys, "argv", [str(script), str(model), str(tmp_path / "out"), str(parts), *share])
    runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "out" / "lillama.json").is_file()
    assert capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_is_short(script: Path) -> None:
    source = script.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 30
    assert f"python examples/{script.name}" in source


def test_the_notebook_draws_the_pictures_of_the_report(
    tiny: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, place in {"MODEL": tiny, "TEXT": text, "OUT": tmp_path / "out"}.items():
        monkeypatch.setenv(name, str(place))
    notebook = nbformat.read(EXAMPLES / "report.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # nothing stands there that no command has printed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter itself
        NotebookClient(notebook, kernel_name="python3", timeout=None).execute()
    shown = [str(output.get("data", {})) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("<svg" in value for value in shown) >= 4

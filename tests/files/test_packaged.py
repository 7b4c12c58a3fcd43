"""lillama tells its version, and finds its data, wherever it lies: installed, as sources, in an archive."""

import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import lillama
from lillama.cli.app import main
from lillama.files.packaged import package_folder
from lillama.recipes.recipe import recipe_names
from lillama.runs import result

ROOT = Path(__file__).parents[2]
FROM_ARCHIVE = """
import importlib.metadata, sys
from pathlib import Path
import lillama
from lillama.files.packaged import package_folder
assert ".zip" in lillama.__file__
assert lillama.__version__ == sys.argv[1]
folder = package_folder("recipes")
assert package_folder("recipes") is folder
print(folder, *sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*.yaml")))
"""


def test_data_are_found_in_an_archive_too_and_leave_nothing(tmp_path: Path) -> None:
    source = Path(lillama.__file__).parent
    shutil.copytree(source, tmp_path / "sources" / "lillama", ignore=shutil.ignore_patterns("__pycache__"))
    archive = shutil.make_archive(str(tmp_path / "app"), "zip", tmp_path / "sources")
    command = [sys.executable, "-c", FROM_ARCHIVE, lillama.__version__]
    done = subprocess.run(
        command, env={"PYTHONPATH": archive}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    folder, *found = done.stdout.split()
    names = [
        file.relative_to(package_folder("recipes")).as_posix() for file in package_folder("recipes").rglob("*.yaml")
    ]
    assert found == sorted(names) and not Path(folder).exists()


def test_every_named_recipe_lies_in_the_package() -> None:
    assert {"default", "paper", "baselines/svd"} <= set(recipe_names())
    assert package_folder("recipes") == Path(lillama.__file__).parent / "recipes"


def test_the_build_reads_the_version_that_the_package_tells() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    file = ROOT / project["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{lillama.__version__}"\n' in file.read_text(encoding="utf-8")


def test_no_metadata_are_needed_to_tell_versions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    told = result.environment()
    assert told["lillama"] == lillama.__version__ and all(told.values()) and "unknown" not in told.values()
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0 and capsys.readouterr().out.strip() == lillama.__version__

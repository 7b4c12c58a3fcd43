import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from lillama.files import atomic_file, atomic_folder, digest, file_digest, write_json


class Killed(BaseException):
    """Stands for a signal that ends the process."""


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A folder with an earlier result."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    return folder


def replace(folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        (temporary / "deep").mkdir()
        (temporary / "deep" / "new.txt").write_text("new")


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Killed])
def test_a_file_keeps_its_old_content_when_the_writer_fails(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert content(tmp_path) == {"a.json": "old"}


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists() and temporary.parent == tmp_path and temporary.name.endswith(".tmp")
    assert content(tmp_path) == {"a.json": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Killed])
def test_a_folder_keeps_its_old_content_when_the_writer_fails(error: type[BaseException], finished: Path) -> None:
    with pytest.raises(error), atomic_folder(finished) as temporary:
        (temporary / "half.txt").write_text("half")
        raise error
    assert content(finished.parent) == {"out/old.txt": "old"}


def test_a_folder_takes_the_place_of_the_old_one(finished: Path) -> None:
    replace(finished)
    assert content(finished.parent) == {"out/deep/new.txt": "new"}


def test_a_folder_is_made_where_none_was(tmp_path: Path) -> None:
    replace(tmp_path / "some" / "where")
    assert content(tmp_path) == {"some/where/deep/new.txt": "new"}


@pytest.mark.parametrize("at", [1, 2])
def test_a_failure_between_the_two_renames_brings_the_old_folder_back(
    at: int, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Path.rename, list[Path]()

    def failing(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == at:
            raise OSError("broken")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="broken"):
        replace(finished)
    assert content(finished.parent) == {"out/old.txt": "old"}


def killed_before_the_renames(folder: Path) -> None:
    aside = folder.parent / ".out.lillama"
    (aside / "new").mkdir(parents=True)
    (aside / "lock").touch()
    (aside / "new" / "half.txt").write_text("half")


def killed_between_the_renames(folder: Path) -> None:
    killed_before_the_renames(folder)
    folder.rename(folder.parent / ".out.lillama" / "old")


def killed_after_the_renames(folder: Path) -> None:
    aside = folder.parent / ".out.lillama"
    (aside / "old").mkdir(parents=True)
    (aside / "lock").touch()
    (aside / "old" / "older.txt").write_text("older")


KILLS = [killed_before_the_renames, killed_between_the_renames, killed_after_the_renames]


@pytest.mark.parametrize("kill", KILLS)
def test_what_a_kill_left_behind_does_not_stand_in_the_way(kill: Callable[[Path], None], finished: Path) -> None:
    kill(finished)
    replace(finished)
    assert content(finished.parent) == {"out/deep/new.txt": "new"}


@pytest.mark.parametrize("kill", KILLS)
def test_after_a_kill_and_a_failure_the_old_content_is_there(kill: Callable[[Path], None], finished: Path) -> None:
    kill(finished)
    with pytest.raises(ValueError, match="no"), atomic_folder(finished) as temporary:
        assert not list(temporary.iterdir())
        raise ValueError("no")
    assert content(finished.parent) == {"out/old.txt": "old"}


def test_a_link_to_a_folder_stays_a_link(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    link = tmp_path_factory.mktemp("elsewhere") / "link"
    link.symlink_to(finished)
    replace(link)
    assert link.is_symlink() and content(finished) == {"deep/new.txt": "new"} == content(link)


def test_everything_is_flushed_before_it_is_renamed(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), real_sync(descriptor))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("rename"), real_rename(self, to))[1])
    replace(finished)
    assert events == ["sync"] * 3 + ["rename", "rename", "sync"]


def test_json_is_written_readably_and_digested_canonically(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": "é", "a": [1]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"b": "é", "a": [1]} and "é" in text and text.endswith("}\n")
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1}) != digest({"a": 2, "b": 2})
    assert file_digest(tmp_path / "a.json") == sha256(text.encode()).hexdigest()

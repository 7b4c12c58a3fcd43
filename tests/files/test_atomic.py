import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from lillama.errors import ModelError
from lillama.files import atomic as files
from lillama.files.atomic import atomic_file, atomic_folder, digest, file_digest, read_json, write_json


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


@pytest.mark.parametrize("text", ['{"a": [1, {"b": null}], "a": 2.5}', '{"a": NaN, "é": "\\ud83d\\ude00"}', " {} "])
def test_an_object_is_read_as_json_reads_it(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert repr(read_json(tmp_path / "a.json", ModelError, "mend it")) == repr(json.loads(text))


BAD_JSON = {
    "empty": (b"", "not valid JSON"),
    "cut off": (b'{"a": ', "not valid JSON"),
    "deep lists": (b"[" * 100_000, "nested too deeply"),
    "deep and closed": (b'{"a":' * 400 + b"1" + b"}" * 400, "nested too deeply"),
    "deeper than it could be copied": (b'{"a":' + b"[" * 300 + b"]" * 300 + b"}", "nested too deeply"),
    "not UTF-8": (b'{"a": "\xff"}', "not valid JSON .*0xff"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
    "a mark before it": (b'\xef\xbb\xbf{"a": 1}', "not valid JSON .*BOM"),
    "a list": (b"[1]", "a JSON list, where an object"),
    "null": (b"null", "a JSON NoneType"),
    "a number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "half a character": (b'{"a": "\\ud83d"}', "half a character"),
    "half a character in a key": (b'{"\\udc00": 1}', "half a character"),
    "two values": (b"{} {}", "not valid JSON"),
    "no file": (None, "cannot be read .No such file"),
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_what_is_no_json_object_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    content, match = BAD_JSON[kind]
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=match) as refusal:
        read_json(path, ModelError, "mend it")
    text = str(refusal.value)
    assert text.startswith(f"{path}: ") and text.endswith("; mend it") and len(text.splitlines()) == 1


def test_what_is_no_file_and_what_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ModelError, match="cannot be read"):
            read_json(place, ModelError, "mend it")
    monkeypatch.setattr(files, "JSON_BYTES", 10)
    (tmp_path / "large").write_text('["more than ten"]')
    with pytest.raises(ModelError, match="larger than"):
        read_json(tmp_path / "large", ModelError, "mend it")


def test_a_link_in_a_circle_is_no_file(tmp_path):
    (tmp_path / "plan.json").symlink_to("plan.json")
    with pytest.raises(ModelError, match=r"plan\.json: cannot be read \(Too many levels of symbolic links\); mend it"):
        read_json(tmp_path / "plan.json", ModelError, "mend it")

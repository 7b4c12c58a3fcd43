"""Files and folders are read, links followed without going in circles; what is neither is told by its name."""

import os
import re
import socket
from pathlib import Path

import pytest

from lillama.corpus.documents import documents
from lillama.corpus.paths import files_below, standing, whole_text
from lillama.corpus.sources import Source, check_exists, data_files, fingerprint
from lillama.corpus.texts import read_text
from lillama.errors import DataError, ProbeError
from lillama.evaluation.windows import label_texts


def pipe(path: Path) -> None:
    os.mkfifo(path)


def local_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(path.parent)  # names of sockets are short
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


ODD = {
    "pipe": (pipe, "is a pipe"),
    "socket": (local_socket, "is a socket"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device"),
    "broken link": (lambda path: path.symlink_to("gone.txt"), r"is a link to gone\.txt, which is not there"),
    "circle": (lambda path: path.symlink_to(path.name), "links lead in a circle"),
    "folder": (lambda path: path.mkdir(), "is a folder|holds no|no .* file of split"),
    "nothing": (lambda path: None, "no such file"),
}
READERS = {
    "calibration": lambda path, tokenizer: list(documents(Source(str(path)), tokenizer)),
    "fingerprint": lambda path, tokenizer: fingerprint(Source(str(path))),
    "evaluation": lambda path, tokenizer: read_text(path),
    "table": lambda path, tokenizer: whole_text(path, DataError),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("what", ODD)
def test_what_is_no_file(tmp_path, tokenizer, what, reader):
    make, match = ODD[what]
    path = tmp_path / "novel.txt"
    make(path)
    with pytest.raises(DataError, match=match) as caught:
        READERS[reader](path, tokenizer)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["pipe", "socket", "device", "broken link", "circle"])
def test_what_is_no_file_in_a_folder_of_text(tmp_path, tokenizer, what):
    (tmp_path / "a.txt").write_text("a")
    ODD[what][0](tmp_path / "b.txt")
    ODD[what][0](tmp_path / "b.png.tmp")  # is none of ours
    for read in (READERS["calibration"], READERS["fingerprint"]):
        with pytest.raises(DataError, match=rf"b\.txt: .*({ODD[what][1]})"):
            read(tmp_path, tokenizer)
    (tmp_path / "b.txt").unlink()
    assert READERS["fingerprint"](tmp_path, tokenizer) and READERS["calibration"](tmp_path, tokenizer)


def test_a_place_that_may_not_be_looked_at_is_not_missing(tmp_path, monkeypatch):
    def denied(self, **options):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", denied)
    for name in ("novel.txt", "owner/data"):  # the second could be a dataset of the hub
        with pytest.raises(DataError, match=rf"{name}: cannot be read \(Permission denied\)"):
            check_exists(Source(name))


@pytest.mark.parametrize(
    ("path", "match"),
    [("x" * 5000, "File name too long"), ("a\0b.txt", "null"), ("", "empty path"), ("a\udcff.txt", "UTF-8")],
)
def test_paths_that_can_be_none(path, match):
    with pytest.raises(DataError, match=match):
        check_exists(Source(path))


def test_texts_to_evaluate_of_such_names():
    assert label_texts("x" * 5000) == [(None, Path("x" * 5000))]


def test_linked_folders_are_entered_but_none_twice(tmp_path, tokenizer):
    inside, outside = tmp_path / "texts", tmp_path / "elsewhere"
    (inside / "sub").mkdir(parents=True)
    (outside / "deep").mkdir(parents=True)
    for path in (inside / "a.txt", inside / "sub" / "b.txt", outside / "c.txt", outside / "deep" / "d.txt"):
        path.write_text(path.stem)
    plain = files_below(inside)
    (inside / "again").symlink_to(inside / "sub")  # reached by its own name before
    (inside / "sub" / "up").symlink_to(inside)
    (outside / "deep" / "self").symlink_to(outside)
    assert files_below(inside) == plain == sorted(path for path in inside.rglob("*") if path.is_file())
    (inside / "linked").symlink_to(outside)
    (inside / "linked too").symlink_to(outside)
    names = [path.relative_to(inside).as_posix() for path in data_files(inside, Source(str(inside)))]
    assert names == ["a.txt", "linked/c.txt", "linked/deep/d.txt", "sub/b.txt"]
    assert [document.text for document in documents(Source(str(inside)), tokenizer)] == ["a", "c", "d", "b"]


def test_a_folder_that_may_not_be_listed_is_told(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=rf"{re.escape(str(tmp_path))}: cannot be read \(Permission denied\)"):
        files_below(tmp_path)


def test_errors_are_of_the_kind_that_is_asked_for(tmp_path):
    (tmp_path / "a").write_bytes(b"caf\xe9")
    with pytest.raises(ProbeError, match="not UTF-8 at byte 3"):
        whole_text(tmp_path / "a", ProbeError)
    with pytest.raises(ProbeError, match="is a folder"):
        whole_text(tmp_path, ProbeError)
    assert (
        standing(tmp_path) == "folder" and standing(tmp_path / "a") == "file" and standing(tmp_path / "b") == "nothing"
    )

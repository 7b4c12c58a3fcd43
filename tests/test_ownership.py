"""What is the user's stays: OUT, the run folder and all that stands beside them lose only what lillama wrote there."""

import json
import shutil
from pathlib import Path

import pytest

from lillama.errors import DataError, LillamaError, OutputError
from lillama.files.atomic import atomic_folder, claim_place
from lillama.pipeline import compress as story
from lillama.pipeline.api import compress
from lillama.runs import result
from lillama.runs.run_dir import open_run

IDENTITY = {"recipe": {"keep": 0.8}}


@pytest.fixture(scope="module")
def untaught(tiny, quick, tmp_path_factory):
    """A finished result, its run folder beside it."""
    return compress(tiny, tmp_path_factory.mktemp("result") / "out", recipe=quick(distill={"epochs": 0}))


@pytest.fixture
def out(untaught, tmp_path) -> Path:
    """A copy of a result and its run folder, which a test may spoil."""
    shutil.copytree(untaught.path, tmp_path / "out")
    shutil.copytree(untaught.run, tmp_path / "out.run")
    return tmp_path / "out"


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")


def edited(out: Path) -> None:
    with (out / "README.md").open("a") as file:
        file.write("my findings")


def link(out: Path) -> None:
    put(out.parent / "elsewhere" / "mine")
    (out / "config.json").unlink()
    (out / "config.json").symlink_to(out.parent / "elsewhere" / "mine")


def listed_nowhere(out: Path) -> None:
    value = json.loads((out / "lillama.json").read_text())
    (out / "lillama.json").write_text(json.dumps({key: value[key] for key in value if key != "files"}))


USERS = {
    "a file": (lambda out: put(out / "notes.txt"), "holds notes.txt, which would be lost"),
    "a hidden file": (lambda out: put(out / ".mine"), "holds .mine, which would be lost"),
    "a folder": (lambda out: put(out / "logs" / "mine"), "holds the folder logs, which would be lost"),
    "an empty folder": (lambda out: (out / "logs").mkdir(), "holds the folder logs"),
    "a link": (lambda out: (out / "here").symlink_to(out), "holds here, which would be lost"),
    "an edited card": (edited, r"README\.md was changed since lillama wrote it"),
    "weights trained further": (lambda out: put(out / "model.safetensors"), r"model\.safetensors was changed"),
    "a link in the place of a file": (link, r"config\.json was changed"),
    "no list of files": (listed_nowhere, "does not tell which files lillama wrote"),
}


@pytest.mark.parametrize("kind", USERS)
def test_what_the_user_put_into_out_is_named_and_stays(tiny, quick, out, kind):
    spoil, match = USERS[kind]
    spoil(out)
    before = content(out.parent)
    with pytest.raises(OutputError, match=match):
        compress(tiny, out, recipe=quick(distill={"epochs": 0}))
    assert content(out.parent) == before


def test_what_comes_while_the_work_goes_on_stays_too(tiny, quick, out, monkeypatch):
    (out / "notes.txt").unlink(missing_ok=True)
    measured = story._measure_change

    def late(*args):
        put(out / "notes.txt")
        return measured(*args)

    monkeypatch.setattr(story, "_measure_change", late)
    with pytest.raises(OutputError, match=r"holds notes\.txt"):
        compress(tiny, out, recipe=quick(distill={"epochs": 0}))
    assert (out / "notes.txt").read_text() == "mine" and (out / "model.safetensors").is_file()


def test_a_result_of_the_same_command_is_replaced(tiny, quick, out):
    (out / "model.safetensors").unlink()
    weights = compress(tiny, out, recipe=quick(distill={"epochs": 0})).path / "model.safetensors"
    assert weights.is_file()
    assert {path.name for path in out.parent.iterdir()} == {"out", "out.run"}


@pytest.mark.parametrize("name", [".out.tmp", ".out.old", ".out.lillama", "out.tmp", ".out.run.lillama"])
def test_neighbours_stay(tiny, quick, tmp_path, name):
    put(tmp_path / name / "mine")
    put(tmp_path / name / "new" / "mine")
    put(tmp_path / name / "old" / "mine")
    before = content(tmp_path / name)
    if name == ".out.lillama":
        with pytest.raises(OutputError, match=r"\.out\.lillama: holds mine, which is not of lillama"):
            compress(tiny, tmp_path / "out", recipe=quick(distill={"epochs": 0}))
    else:
        compress(tiny, tmp_path / "out", recipe=quick(distill={"epochs": 0}))
    assert content(tmp_path / name) == before


@pytest.mark.parametrize("name", ["new", "old"])
def test_folders_without_our_mark_stay(tmp_path, name):
    put(tmp_path / ".out.lillama" / name / "mine")
    with pytest.raises(OutputError, match="is not of lillama"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / ".out.lillama" / name / "mine").is_file() and not (tmp_path / "out").exists()


def test_one_process_for_one_out(tiny, quick, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with claim_place(tmp_path / "out"):
        for out in (tmp_path / "out", tmp_path / "x" / ".." / "out", tmp_path / "link"):
            with pytest.raises(OutputError, match="another process"):
                compress(tiny, out, recipe=quick(), run=tmp_path / "other")
        assert not (tmp_path / "other").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"link"}
    assert compress(tiny, tmp_path / "link", recipe=quick(distill={"epochs": 0})).path.is_symlink()
    assert (tmp_path / "out" / "lillama.json").is_file()


def test_parents_that_were_made_for_a_refusal_go_again(tiny, quick, tmp_path):
    with pytest.raises(LillamaError):
        compress(tmp_path / "none", tmp_path / "a" / "b" / "out", recipe=quick(), run=tmp_path / "c" / "d" / "run")
    assert not list(tmp_path.iterdir())


def test_a_place_where_nothing_can_be_written(tmp_path, monkeypatch):
    def refuse(self: Path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", lambda self, **kwargs: refuse(self) if self.suffix == ".lillama" else None)
    with (
        pytest.raises(OutputError, match=r"out: nothing can be written to .* \(Permission denied\)"),
        claim_place(tmp_path / "out"),
    ):
        pass


def test_a_mounted_disk_is_not_replaced(tiny, quick, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "out")
    with pytest.raises(OutputError, match="a disk is mounted here"):
        result.refuse_foreign(tmp_path / "out")


def test_links_in_a_circle(tiny, quick, tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for places in ({"out": tmp_path / "a"}, {"out": tmp_path / "out", "run": tmp_path / "a"}):
        with pytest.raises(OutputError, match="leads nowhere"):
            compress(tiny, recipe=quick(), **places)


# The run folder


FOREIGN = {
    "a project": {"run.json": '{"my": "project"}', "thesis.tex": "dear"},
    "a project alone": {"run.json": '{"my": "project"}'},
    "a list": {"run.json": "[1, 2]"},
    "no JSON": {"run.json": "run: fast", "Makefile": "all:"},
    "our keys without our seal": {"run.json": '{"version": 1, "identity": {"recipe": 1}}', "thesis.tex": "dear"},
    "a damaged run with something else": {"run.json": "{", "lock": "", "thesis.tex": "dear"},
}


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_of_somebody_else_is_refused_and_stays(tmp_path, kind, restart):
    for name, text in FOREIGN[kind].items():
        (tmp_path / name).write_text(text)
    with pytest.raises(OutputError, match="something else than a run") as caught, open_run(tmp_path, IDENTITY, restart):
        pass
    assert "--restart" not in str(caught.value)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == FOREIGN[kind]


def test_restart_removes_what_a_run_wrote_and_nothing_else(tmp_path):
    with open_run(tmp_path, IDENTITY) as run:
        run.calibration.mkdir()
    for name in (
        "blocks/0000.json",
        "blocks/0000.safetensors",
        "joint-1/state.json",
        "sequential/0001/first/state.json",
        "recovery/0.004/0000.safetensors",
    ):
        put(tmp_path / name)
    mine = {"notes.txt", "evaluation.json", "report.html", "blocks/notes.txt", "recovery/0.004/mine.txt", "old/x.json"}
    for name in mine:
        put(tmp_path / name)
    (tmp_path / "elsewhere").mkdir()
    put(tmp_path / "elsewhere" / "0000.json")
    (tmp_path / "recovered").symlink_to(tmp_path / "elsewhere")
    with open_run(tmp_path, {"recipe": 2}, restart=True):
        pass
    assert set(content(tmp_path)) == mine | {"run.json", "lock", "elsewhere/0000.json"}


@pytest.mark.parametrize("kind", ["folder", "link", "link to nothing"])
def test_a_refusal_leaves_the_place_of_the_run_as_it_was(tmp_path, kind):
    run, real = tmp_path / "run", tmp_path / "real"
    if kind == "folder":
        run.mkdir()
    else:
        run.symlink_to(real)
    if kind == "link":
        real.mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="too short"), open_run(run, IDENTITY):
        raise DataError("too short")
    assert sorted(tmp_path.rglob("*")) == before and run.is_symlink() == (kind != "folder")
    with open_run(run, IDENTITY) as begun:
        begun.calibration.mkdir()
    assert (run / "run.json").is_file()


def test_blocks_outlive_a_refusal(tmp_path):
    """Tokens that are gone and cannot be gathered again are no reason to remove what was taught."""
    with open_run(tmp_path / "run", IDENTITY) as run:
        (run.path / "blocks").mkdir()
    with pytest.raises(DataError), open_run(tmp_path / "run", IDENTITY):
        raise DataError("no text")
    assert (tmp_path / "run" / "blocks").is_dir()


def test_a_damaged_marker_names_the_remedy(tmp_path):
    with open_run(tmp_path, IDENTITY) as run:
        run.calibration.mkdir()
    marker = tmp_path / "run.json"
    marker.write_text(marker.read_text().replace("0.8", "0.9"))
    with (
        pytest.raises(OutputError, match=r"run\.json: damaged; begin anew with --restart"),
        open_run(tmp_path, IDENTITY),
    ):
        pass

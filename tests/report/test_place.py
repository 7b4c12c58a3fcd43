"""A report replaces an earlier report, and nothing else."""

import json
from pathlib import Path

import pytest

from lillama.cli.app import main
from lillama.errors import OutputError
from lillama.report.page import report, write
from lillama.runs.run_dir import open_run


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_report_is_known_again_and_replaced(out, unfinished, tmp_path):
    places = write(report([unfinished]), tmp_path / "page.html", refresh=1)
    before = content(tmp_path)
    assert write(report([out]), tmp_path / "page.html") == places
    assert all(place.read_bytes() != before[place] for place in places)
    for place in places:
        place.rename(place.with_stem("moved"))
    assert write(report([out]), tmp_path / "moved.html")[0].stem == "moved"


@pytest.mark.parametrize("name", ["README.html", "README.md", "README.json"])
@pytest.mark.parametrize("text", ["", "mine", "{}", '{"seal": 1, "models": []}', "<!-- lillama report -->"])
def test_what_is_not_ours_stays(name, text, out, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    before = content(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(out), "--out", str(tmp_path / "README.html")])
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / name}: was not written by `lillama report`") and error.count("\n") == 1
    assert content(tmp_path) == before


@pytest.mark.parametrize("suffix", [".html", ".md", ".json"])
def test_a_report_that_was_changed_is_not_ours(suffix, out, tmp_path):
    write(report([out]), tmp_path / "page.html")
    place = tmp_path / f"page{suffix}"
    text = place.read_text()
    place.write_text(f"my findings\n{text}" if suffix != ".json" else json.dumps(json.loads(text) | {"mine": 1}))
    before = content(tmp_path)
    with pytest.raises(OutputError, match=rf"page\{suffix}: .*changed since"):
        write(report([out]), tmp_path / "page.html")
    assert content(tmp_path) == before


def test_folders_and_links_are_refused(out, tmp_path):
    (tmp_path / "a.html").mkdir()
    (tmp_path / "b.md").symlink_to("nowhere")
    for name in ("a", "b"):
        with pytest.raises(OutputError, match="was not written by"):
            write(report([out]), tmp_path / f"{name}.html")
    with pytest.raises(OutputError, match="none: no such folder; make it"):
        write(report([out]), tmp_path / "none" / "page.html")


@pytest.mark.parametrize("name", ["metrics.html", "probe.html", "blocks/0000.html", "plan"])
def test_a_report_does_not_pass_for_an_artefact_of_a_run(name, out, tmp_path):
    with open_run(tmp_path / "run", {"recipe": {}}) as run:
        (run.path / "blocks").mkdir()
    with pytest.raises(OutputError, match=r"lies in the run folder .*run, where a report is called report\.html"):
        write(report([out]), tmp_path / "run" / name)
    assert write(report([out]), tmp_path / "run" / "report.html")[0].is_file()


@pytest.mark.parametrize("name", ["", ".", "..", "x/.."])
def test_a_place_needs_a_name(name, out, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(out), "--out", name])
    assert "--out is a file to make; give it a name" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_time_that_is_none(seconds, unfinished, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(unfinished), "--watch", "--every", seconds])
    assert f"--every is {seconds}; it is the seconds" in capsys.readouterr().err

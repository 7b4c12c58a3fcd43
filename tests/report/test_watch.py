"""A page beside a run that goes on: it changes with every block, and ends with the run."""

import time
from pathlib import Path
from threading import Thread

import pytest

from lillama.cli.app import main
from lillama.pipeline.api import compress
from lillama.system.progress import Progress

PATIENCE = 300.0  # seconds; only a page that never comes takes so long, however busy the machine
REFRESH = 'http-equiv="refresh" content="0.2"'


def shown(page: Path, words: str) -> str:
    """Wait until a page says something, and return it."""
    end = time.monotonic() + PATIENCE
    while words not in (content := page.read_text(encoding="utf-8") if page.is_file() else ""):
        assert time.monotonic() < end, f"{page} never said {words!r}"
        time.sleep(0.01)
    return content


def test_the_page_follows_a_run_to_its_end(tiny, quick, text, tmp_path, capsys):
    run, pages = tmp_path / "small.run", []

    def watch() -> None:
        with pytest.raises(SystemExit, match="0"):
            main(["report", str(run), "--watch", "--every", "0.2"])

    watcher = Thread(target=watch, daemon=True)

    def waiting(progress: Progress) -> None:
        """Hold the run after each block until the page tells of it."""
        if progress.task == "taught":
            if not pages:
                watcher.start()
            pages.append(shown(run / "report.html", f"{len(pages) + 1} of 3 blocks are taught"))

    compress(tiny, tmp_path / "small", recipe=quick(distill={"epochs": 1}), texts=[text], report=waiting)
    watcher.join(PATIENCE)
    assert not watcher.is_alive() and capsys.readouterr().out.split() == [str(run / "report.html")]
    assert len(pages) == 3 and all(REFRESH in page for page in pages)
    last = (run / "report.html").read_text(encoding="utf-8")
    assert REFRESH not in last and "perplexity, words" in last and "Not finished" not in last

"""`lillama report`."""

from pathlib import Path
from typing import Annotated

from lillama.recipes.options import Flag, Many


def report(
    paths: Annotated[list[Path], Many],
    /,
    *,
    out: Path | None = None,
    evaluation: Path | None = None,
    probe: Annotated[list[Path] | None, Many] = None,
    bench: Path | None = None,
    watch: Annotated[bool, Flag] = False,
    every: float = 5.0,
) -> None:
    """Write a page about PATHS, results or run folders: one HTML file without links, and the same as Markdown and JSON.

    Only files are read, never a model. Several PATHS are compared.

    Parameters
    ----------
    paths
        Folders that `lillama compress` made: OUT, or a run folder, finished or not.
    out
        HTML file to write; .md and .json go beside it [default: report.html in the first run folder, OUT-report.html].
    evaluation
        What `lillama evaluate --json` printed about the first of PATHS [default: evaluation.json in the run folder].
    probe
        What `lillama probe --json` printed about it, one or more files [default: probe*.json in the run folder].
    bench
        What `lillama bench --json` printed about it [default: bench.json in the run folder].
    watch
        Write the page again and again until the run is finished.
    every
        Seconds between two times, with --watch.
    """
    import sys

    from lillama.errors import DataError, plain
    from lillama.report.artefacts import Extra
    from lillama.report.watch import default_place, watch_runs, write_report

    for file in (evaluation, bench, *(probe or ())):
        if file is not None and not watch and not file.is_file():  # a run that is watched may yet write it
            raise DataError(
                f"{file}: there is no such file; give what `lillama {_printer(file, evaluation, bench)} --json` printed"
            )
    extra = Extra(evaluation, tuple(probe or ()), bench)
    place = out or default_place(paths[0])
    page = watch_runs(paths, place, extra, every) if watch else write_report(paths, place, extra)
    sys.stdout.write(f"{plain(str(page))}\n")


def _printer(file: Path, evaluation: Path | None, bench: Path | None) -> str:
    """Return the command that prints what a file should hold."""
    return "evaluate" if file == evaluation else "bench" if file == bench else "probe"

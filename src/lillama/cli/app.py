"""The command line: parse, call the library, print. Errors are one line on standard error."""

import errno
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from cyclopts import App, CycloptsError

from lillama.cli.bench import bench
from lillama.cli.compress import compress
from lillama.cli.evaluate import evaluate
from lillama.cli.export import export
from lillama.cli.make_stimuli import make
from lillama.cli.plan import plan
from lillama.cli.probe import probe
from lillama.cli.process import Stopped, quieten, status, stoppable, streams, unwritten
from lillama.cli.report import report
from lillama.errors import LillamaError, RecipeError, one_line
from lillama.version import __version__

PATHS = (
    PermissionError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
)  # the user named it
NAMES = (errno.ELOOP, errno.ENAMETOOLONG)  # no file can have them

IN_FILES = (["compress"], ["export"], ["report"], ["probe", "make"])  # commands whose work is not what they print

app = App(
    name="lillama",
    help="Make a pretrained language model smaller: fewer numbers and fewer bits, where they matter least.",
    version=__version__,
    version_flags=["--version"],
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `run` tells of it
)
for command in (compress, plan, evaluate, export, bench, report):
    app.command(command)
probing = App(name="probe")
probing.default(probe)
probing.command(make, name="make")
app.command(probing)


def console() -> None:
    """Run the `lillama` command of a terminal, in which lillama alone speaks.

    Warnings of the libraries that it is made of are for their programmers; `python -W`, and transformers'
    `TRANSFORMERS_VERBOSITY`, bring them back.
    """
    quieten()
    main()


def main(tokens: Sequence[str] | None = None) -> None:
    """Run the command line.

    It exits with 0, with 2 for what the user can mend, with 1 for a failure of the machine, with 128 and its number after a
    signal. Where the work is done but its table cannot be printed the status is 0 if the work is in files.
    """
    words = list(sys.argv[1:] if tokens is None else tokens)
    with streams() as out:
        code = run(lambda: _call(words), resumable=words[:1] == ["compress"])
        reason = unwritten(out)
        if reason is not None and not code:
            code = _unsaid(reason, words[:1] in IN_FILES or words[:2] in IN_FILES)
    sys.exit(code)


def _call(words: list[str]) -> Any:
    """Call the command that some words ask for."""
    for word in words:
        if not word.isascii() and any("\ud800" <= letter <= "\udfff" for letter in word):
            raise RecipeError(f"{word}: this name is not UTF-8, in which lillama notes it; rename the file")
    return app(words, exit_on_error=False, print_error=False)


def run(work: Callable[[], Any], resumable: bool = False) -> int:
    """Run something and return the exit status; an error becomes one line on standard error."""

    def stopped(number: int) -> int:
        again = "; the same command goes on" if resumable else ""
        return _fail(f"stopped by {signal.Signals(number).name}{again}", status(number))

    try:
        with stoppable(stopped):
            work()
    except (CycloptsError, LillamaError) as error:
        return _fail(str(error), getattr(error, "exit_status", 2))
    except Stopped as stop:
        return stopped(stop.number)
    except KeyboardInterrupt:
        return _fail("interrupted; an interrupted `compress` goes on with the same command", 1)
    except BrokenPipeError:
        return 1
    except OSError as error:
        named = isinstance(error, PATHS) or error.errno in NAMES
        return _fail(f"{error.filename or 'machine'}: {error.strerror or error}", 2 if named else 1)
    return 0


def _unsaid(reason: str, in_files: bool) -> int:
    """Tell that standard output took no more; return the exit status."""
    if not in_files:
        return _fail(f"standard output: {reason}; what was to be said there is lost", 1)
    sys.stderr.write(f"warning: standard output: {reason}; the work is done all the same\n")
    return 0


def _fail(text: str, code: int) -> int:
    sys.stderr.write(f"error: {one_line(text)}\n")
    return code


if __name__ == "__main__":
    console()

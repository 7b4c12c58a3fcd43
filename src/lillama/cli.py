"""The command line: parse, call the library, print. Errors are one line on standard error."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from cyclopts import App, CycloptsError

from lillama.commands.bench import bench
from lillama.commands.compress import compress
from lillama.commands.evaluate import evaluate
from lillama.commands.export import export
from lillama.commands.make_stimuli import make
from lillama.commands.plan import plan
from lillama.commands.probe import probe
from lillama.commands.report import report
from lillama.errors import LillamaError

PATHS = (
    PermissionError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
)  # the user named it

app = App(
    name="lillama",
    help="Make a pretrained language model smaller: low-rank factors, taught block by block.",
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

# Libraries that other libraries import, and that tell on import what does not concern a user of this command.
TALKATIVE = ("torchao", "torch.utils._pytree")


def console() -> None:
    """Run the `lillama` command of a terminal, in which lillama alone speaks.

    Warnings of the libraries that it is made of are for their programmers; `python -W`, and transformers'
    `TRANSFORMERS_VERBOSITY`, bring them back.
    """
    quieten()
    main()


def quieten() -> None:
    """Let other libraries tell of errors only; call it before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def main(tokens: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 0, with 2 for what the user can mend, with 1 for a failure of the machine."""
    sys.exit(run(lambda: app(tokens, exit_on_error=False, print_error=False)))


def run(work: Callable[[], Any]) -> int:
    """Run something and return the exit status; an error becomes one line on standard error."""
    try:
        work()
    except (CycloptsError, LillamaError) as error:
        return _fail(str(error), getattr(error, "exit_status", 2))
    except KeyboardInterrupt:
        return _fail("interrupted; an interrupted `compress` goes on with the same command", 1)
    except BrokenPipeError:
        return 1
    except OSError as error:
        return _fail(f"{error.filename or 'machine'}: {error.strerror or error}", 2 if isinstance(error, PATHS) else 1)
    return 0


def _fail(text: str, status: int) -> int:
    sys.stderr.write(f"error: {' '.join(text.split())}\n")
    return status


if __name__ == "__main__":
    console()

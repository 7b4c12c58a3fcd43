"""The exceptions of lillama: everything that a user can mend is a `LillamaError`, and its text is one clear line."""

import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

SHOWN = 64  # characters of a value in a line
LINE = 1000  # characters of a message
JOINERS = "\u200c\u200d"  # without which some scripts and signs are written wrong; they move nothing


class LillamaError(Exception):
    """Base of all errors raised on purpose; the text names the thing, the value found and the remedy.

    Attributes:
        exit_status: what the command line returns: 2 for what the user can mend, 1 for a failure of the machine.

    Examples:
        >>> import lillama
        >>> try:
        ...     lillama.plan("demo/model", keep=1.5)
        ... except lillama.LillamaError as error:
        ...     print(error.exit_status, error)
        2 keep is 1.5: it must be less than or equal to 1
    """

    exit_status = 2


class ModelError(LillamaError):
    """The model folder, its configuration, its weights or its tokenizer cannot be used."""


class DataError(LillamaError):
    """Text, speech or images, of calibration or of evaluation, cannot be used."""


class BudgetError(LillamaError):
    """No rank plan meets the wanted size."""


class RecipeError(LillamaError):
    """A recipe, a rank plan or an option is not understood."""


class OutputError(LillamaError):
    """The output folder or the run folder cannot be used."""


class DamagedError(OutputError):
    """An artefact of a run folder is missing, or is not what was written there: a bit rotted, or somebody changed it.

    Args:
        path: of the artefact.
        what: is wrong with it.
    """

    def __init__(self, path: Path, what: str = "is damaged: its content does not match its digest") -> None:
        super().__init__(f"{path} {what}; the same command makes it again")
        self.path, self.what = path, what


class ProbeError(LillamaError):
    """A benchmark, its data or a table of trials cannot be used."""


class ResourceError(LillamaError):
    """Disk or memory does not suffice; the text names the option that helps."""


class TrainingError(LillamaError):
    """Training failed although every input was sound."""

    exit_status = 1


def printable(value: object) -> str:
    r"""Return a value found in somebody's file as a line can show it: short, without control characters.

    >>> printable("q_proj"), printable(["a"] * 100), printable("a\nb")
    ('q_proj', "['a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', ...", "'a\\nb'")
    """
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the known word nearest to `word`, or an empty string.

    >>> suggestion("uniforn", ["uniform", "bottom"])
    "; did you mean 'uniform'?"
    """
    near = get_close_matches(word, list(known), n=1) if len(word) <= 4 * SHOWN else []  # its time grows with the length
    return f"; did you mean {near[0]!r}?" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def one_line(text: str) -> str:
    r"""Return a message as one line that a terminal may show; of a very long one the beginning and the end.

    >>> one_line("keep is\n2"), len(one_line("a" * 100_000))
    ('keep is 2', 1005)
    """
    line = plain(" ".join(text.split()))
    return line if len(line) <= LINE else f"{line[: LINE // 2]} ... {line[-LINE // 2 :]}"


def plain(text: str) -> str:
    r"""Return text as a terminal may show it: what is no printable character stands as an escape, on one line.

    Names, licences and messages come from others. Printed as they are, their control characters could rewrite the screen, the
    marks of right-to-left text could turn a name around, and halves of surrogate pairs end in an error of the output itself.

    >>> plain("novel[red].txt"), plain("\x1b[2Jnovel\r\u202e")
    ('novel[red].txt', '\\x1b[2Jnovel\\r\\u202e')
    """
    return "".join(letter if _shows(letter) else letter.encode("unicode_escape").decode() for letter in text)


def _shows(letter: str) -> bool:
    return letter.isprintable() or letter in JOINERS or unicodedata.category(letter) == "Zs"

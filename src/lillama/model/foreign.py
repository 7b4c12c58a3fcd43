"""The border to code that is not ours: what transformers, or a model's own code, raises becomes one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError

from lillama.errors import SHOWN, ModelError

# Whatever such code raises for input that does not suit it: every kind of error that Python and these libraries have, but
# ours, which pass as they are. Nowhere else is so much caught.
FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    ReferenceError,
    RuntimeError,
    StopIteration,
    SyntaxError,
    TypeError,
    ValueError,
    SafetensorError,
    StrictDataclassError,
    TemplateError,
)
LINE = 4 * SHOWN  # characters of a reason


@contextmanager
def explain_errors(what: str, remedy: str = "") -> Iterator[None]:
    """Turn what foreign code raises into a `ModelError` of one line.

    Where weights are read, put `shortage_explained` inside: a full disk or memory then keeps its own line.

    Args:
        what: begins the line: which model or file, and what cannot be done with it.
        remedy: ends it.

    Examples:
        >>> with explain_errors("my-model: cannot be loaded", "get a sound copy"):
        ...     raise KeyError("vocab_size")
        Traceback (most recent call last):
        lillama.errors.ModelError: my-model: cannot be loaded (KeyError: 'vocab_size'); get a sound copy
    """
    try:
        yield
    except FOREIGN as error:
        raise ModelError(f"{what} ({reason(error)})" + (f"; {remedy}" if remedy else "")) from error


def reason(error: BaseException) -> str:
    r"""Return what an error says in one line: the line that says most of a text of several, with the class where needed.

    >>> reason(ValueError("the width is 3\nsee the manual")), reason(KeyError("a")), reason(TypeError())
    ('the width is 3', "KeyError: 'a'", 'TypeError')
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    text = text if text.isprintable() else repr(text)
    text = text.rstrip(".") if len(text) <= LINE else f"{text[: LINE - 3]}..."
    return f"{type(error).__name__}: {text}" if isinstance(error, LookupError | AttributeError) else text

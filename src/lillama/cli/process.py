"""A process as the system sees it: streams that may be closed or full, signals that ask it to stop, whose lines it prints."""

import errno
import logging
import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

GRACE = 8.0  # seconds from a signal to the end, whatever is computed meanwhile
STOPS = frozenset(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

# Libraries that other libraries import, and that tell on import what does not concern a user of this command.
TALKATIVE = ("torchao", "torch.utils._pytree")


def quieten() -> None:
    """Let other libraries tell of errors only; call it before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


class Stopped(KeyboardInterrupt):
    """A signal asks the process to stop.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Output:
    """A text stream to which writing never fails: what cannot be written is dropped, and the first failure remembered.

    So that no work is lost because nobody reads what is said about it.

    Args:
        stream: to write to.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write a text; return its length."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        self.write("".join(lines))

    def flush(self) -> None:
        """Hand on what was written."""
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, work: Callable[[], object]) -> None:
        if self.failure is not None:
            return
        try:
            work()
        except OSError as error:
            self.failure = error
            with suppress(OSError):  # what is left in its buffer must not fail again at the end of the process
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


@contextmanager
def streams() -> Iterator[Output]:
    """Let standard output and error take everything, closed or full; yield the output.

    The numbers of closed streams are taken, so that no file of ours gets one of them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    before = sys.stdin, sys.stdout, sys.stderr
    with open(os.devnull) as nothing, open(os.devnull, "w") as nowhere:  # noqa: PTH123
        sys.stdin = before[0] or nothing
        out = Output(before[1] or nowhere)
        sys.stdout, sys.stderr = out, Output(before[2] or nowhere)
        if reconfigure := getattr(before[1], "reconfigure", None):
            reconfigure(errors="backslashreplace")  # names of files need not be text
        try:
            yield out
        finally:
            out.flush()
            sys.stderr.flush()
            sys.stdin, sys.stdout, sys.stderr = before


def unwritten(out: Output) -> str | None:
    """Return why output was not written, in words; None if it was, or if nobody wants more of it."""
    out.flush()
    if out.failure is None or out.failure.errno == errno.EPIPE:
        return None
    return out.failure.strerror or str(out.failure)


@contextmanager
def stoppable(last_words: Callable[[int], object]) -> Iterator[None]:
    """Raise `Stopped` at the first SIGTERM or SIGHUP; a second signal, or `GRACE` seconds, end the process at once.

    A signal that is ignored (`nohup`) stays so. Handlers run between two steps of Python only; a thread watches, so that long
    computations do not matter.

    Args:
        last_words: called with the signal's number, before the process is ended at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told = list[int]()

    def stop(number: int, frame: FrameType | None) -> None:
        told.append(number)
        if len(told) == 1:
            raise Stopped(number) if number != signal.SIGINT else KeyboardInterrupt

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=_watch, args=(reader, last_words), daemon=True)
    mended = [number for number in STOPS if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)]
    before = {number: signal.signal(number, stop) for number in mended}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _watch(reader: int, last_words: Callable[[int], object]) -> None:
    """Wait for a signal, then for another or the end of patience; return when the work is over."""
    first = _signal(reader, None)
    if first is None or _signal(reader, GRACE) is None:
        return
    last_words(first)
    os._exit(status(first))


def _signal(reader: int, seconds: float | None) -> int | None:
    """Return the next signal that stops, or 0 after some seconds; None when the pipe is closed."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        rest = None if end is None else max(0.0, end - time.monotonic())
        if not select.select([reader], [], [], rest)[0]:
            return 0
        found = os.read(reader, 1)
        if not found:
            return None
        if found[0] in STOPS:
            return found[0]


def status(number: int) -> int:
    """Return the exit status after a signal: 1 for an interruption from the keyboard, else 128 and its number."""
    return 1 if number == signal.SIGINT else 128 + number

"""Code of others within bounds of time and memory, in this process."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SIZES = Path("/proc/self/statm")  # pages of this process; on Linux alone


@contextmanager
def ended_within(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` when this process has computed for so long; only the main thread can be stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"it has computed for {seconds:g} s and does not end")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def within_memory(more: int) -> Iterator[None]:
    """Let this process take at most so many bytes more than it has; what asks for more gets a `MemoryError`. On Linux alone."""
    if not SIZES.is_file():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(SIZES.read_text(encoding="ascii").split()[0]) * resource.getpagesize() + more
    known = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([wanted, *known]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

"""What the machine has: free memory and disk, the peak that was used, and plain words when they run out."""

import ctypes
import errno
import re
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError

from lillama.errors import ResourceError, first_line

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_MEMORY = re.compile(r"(can't|cannot) allocate memory|not enough memory|out of memory|_ALLOC_FAILED", re.IGNORECASE)
MMAP_THRESHOLD, LARGE = -3, 4 << 20  # glibc's name of the setting; bytes
GROUPS = Path("/sys/fs/cgroup")
GROUP_LIMITS = (  # of version 2 and of version 1: the limit, what is used, files in memory
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
REMEDY = "lower --seq-len, --activation-memory or, in compress, --micro-batch, or choose another --device"
DISK_REMEDY = "free some, or put OUT and the run folder (--run) on another disk; the same command then goes on"


def pick_device(wanted: str | None) -> torch.device:
    """Return the device by name; None takes an accelerator if there is one.

    Raises:
        ResourceError: no such device here.
    """
    if wanted is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(wanted)
        torch.zeros(1, device=device).item()  # fails on the meta device too
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = first_line(error)
        raise ResourceError(f"device {wanted} cannot be used: {reason}; choose another --device") from None
    return device


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be taken on a device; for the CPU, of the host's memory, or of the container's."""
    own = getattr(
        torch.get_device_module(device), "mem_get_info", None
    )  # an accelerator's that shares none with the host
    if own is not None:
        return own(device)[0]
    return min(psutil.virtual_memory().available, _room_in_group())


def _room_in_group() -> int:
    """Return the bytes that the limit of this process's control group leaves; files in memory that can be dropped are free."""
    for limit, used, files in GROUP_LIMITS:
        try:
            most, taken = (int((GROUPS / name).read_text(encoding="utf-8")) for name in (limit, used))
            rows = (GROUPS / limit).with_name("memory.stat").read_text(encoding="utf-8").splitlines()
            dropped = int(dict(row.split() for row in rows).get(files, 0))
        except (OSError, ValueError):  # no control groups here, or no limit ("max")
            continue
        return max(0, most - taken + dropped)
    return sys.maxsize


def free_disk(path: Path) -> int:
    """Return the free bytes of the disk that a path lies on, or will lie on."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes; on CUDA that of the device is added."""
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    status = Path("/proc/self/status")  # on Linux `getrusage` would count the parent's peak before `exec` too
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    peak = next((line for line in lines if line.startswith("VmHWM")), None)  # some sandboxes leave it out
    if peak is not None:
        return int(peak.split()[1]) * 1024 + device
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit + device


def trim_memory() -> None:
    """Give freed memory back to the system; glibc would keep much of it, more after every block."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def save_memory() -> None:
    """Let every freed tensor of more than a few MB go back to the system at once, for the rest of the process.

    By itself glibc keeps freed pieces of up to 32 MB for later ones, which leaves holes. It costs time: such memory comes
    with zeros each time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGE)


def readable(count: float) -> str:
    """Return a number of bytes in words.

    >>> readable(15_999_488)
    '16 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


@contextmanager
def explain_shortage() -> Iterator[None]:
    """Turn the many errors of a full disk or memory into a `ResourceError` that names the remedy."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise ResourceError(f"out of memory; {REMEDY}") from None
    except (OSError, SafetensorError, RuntimeError) as error:
        number = _error_number(error)
        if number in FULL:
            place = getattr(error, "filename", None) or "disk"
            raise ResourceError(f"{place}: no space left; {DISK_REMEDY}") from None
        if number == errno.ENOMEM or NO_MEMORY.search(str(error)):
            raise ResourceError(f"out of memory; {REMEDY}") from None
        raise


def _error_number(error: Exception) -> int | None:
    """Return the system's number of an error; safetensors has it in its text alone, as `(os error 28)`."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    for most, unit, name in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < most:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 3600:.1f} h"

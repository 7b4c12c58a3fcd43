"""What the machine has: free memory and disk, the peak that was used, and plain words when they run out."""

import errno
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError

from lillama.errors import ResourceError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDY = "lower --micro-batch or --activation-memory, or choose another --device"


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
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ResourceError(f"device {wanted} cannot be used: {reason}; choose another --device") from None
    return device


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be taken on a device; for the CPU, of the host's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def free_disk(path: Path) -> int:
    """Return the free bytes of the disk that a path lies on, or will lie on."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes; on CUDA that of the device is added."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return host + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


@contextmanager
def shortage_explained() -> Iterator[None]:
    """Turn the many errors of a full disk or memory into a `ResourceError` that names the remedy."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise ResourceError(f"out of memory; {REMEDY}") from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise ResourceError(f"{error.filename or 'disk'}: no space left; {_disk_remedy()}") from None
    except SafetensorError as error:
        if "No space left" not in str(error) and "File too large" not in str(error):
            raise
        raise ResourceError(f"no space left on the disk; {_disk_remedy()}") from None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise ResourceError(f"out of memory; {REMEDY}") from None


def _disk_remedy() -> str:
    return "free some, or put OUT and the run folder (--run) on another disk; the same command then goes on"

import errno
import os
import platform
import resource
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lillama.errors import ResourceError
from lillama.system import resources
from lillama.system.resources import explain_shortage, free_disk, free_memory, peak_memory, pick_device

MEMORY = ["--micro-batch", "--activation-memory", "--device"]
DISK = ["--run"]


def system_error(number: int, file: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), file) if file else OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (MemoryError(), MEMORY),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation"), MEMORY),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 12"), MEMORY),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), MEMORY),
        (RuntimeError("unable to mmap 8 bytes from file </x>: Cannot allocate memory (12)"), MEMORY),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), MEMORY),
        (system_error(errno.ENOMEM), MEMORY),
        (SafetensorError("I/O error: Cannot allocate memory (os error 12)"), MEMORY),
        (system_error(errno.ENOSPC, "/big/file"), ["/big/file", *DISK]),
        (system_error(errno.ENOSPC), DISK),
        (system_error(errno.EDQUOT), DISK),
        (system_error(errno.EFBIG), DISK),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), DISK),
        (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"), DISK),
        (SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"), DISK),
    ],
    ids=repr,
)
def test_every_shortage_becomes_one_line_that_names_an_option(error: Exception, options: list[str]) -> None:
    with pytest.raises(ResourceError) as explained, explain_shortage():
        raise error
    text = str(explained.value)
    assert "\n" not in text and all(option in text for option in options)
    assert explained.value.exit_status == 2


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        RuntimeError("size mismatch"),
        FileNotFoundError(errno.ENOENT, "gone"),
        system_error(errno.EIO),
        SafetensorError("Error while deserializing header: header too small"),
        SafetensorError("I/O error: Permission denied (os error 13)"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_all_other_errors_pass_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as passed, explain_shortage():
        raise error
    assert passed.value is error


def test_a_real_shortage_of_memory_is_recognised() -> None:
    with pytest.raises(ResourceError, match="out of memory"), explain_shortage():
        torch.empty(1 << 60)


def test_a_real_full_disk_is_recognised(tmp_path: Path) -> None:
    """A limit on the size of files stands for the end of a disk; it is lifted again, and holds in no other process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(ResourceError, match=r"no space left.*--run"), explain_shortage():
            save_file({"a": torch.ones(100_000)}, tmp_path / "a.safetensors")
        with pytest.raises(ResourceError, match=r"no space left.*--run"), explain_shortage():
            (tmp_path / "a.txt").write_bytes(bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_no_shortage_no_error() -> None:
    with explain_shortage():
        pass


@pytest.mark.parametrize("name", ["no_such_device", "meta", "vulkan", "hpu", "cuda:999", ""])
def test_a_device_that_cannot_compute_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ResourceError, match="choose another --device") as refusal:
        pick_device(name)
    assert "\n" not in str(refusal.value) and name in str(refusal.value)


def test_a_device_is_taken_by_name_or_found() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    found = torch.accelerator.current_accelerator(check_available=True)
    assert pick_device(None) == (found or torch.device("cpu"))


def test_what_is_free_and_what_was_used_are_bytes(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "not" / "yet" / "there") == pytest.approx(free_disk(tmp_path), rel=0.05)
    assert free_disk(Path("relative/not/there")) > 0
    before = peak_memory()
    ballast = torch.ones(30_000_000)
    assert 10**6 < free_memory(torch.device("cpu")) < 10**15
    assert peak_memory() >= before > 10**7 and ballast.sum() > 0


@pytest.mark.parametrize(
    ("version", "limit", "used", "files"),
    [
        (2, "memory.max", "memory.current", "inactive_file"),
        (1, "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_free_memory_is_what_the_container_may_take(tmp_path, monkeypatch, version, limit, used, files):
    monkeypatch.setattr(resources, "GROUPS", tmp_path)
    monkeypatch.setattr(resources.psutil, "virtual_memory", lambda: SimpleNamespace(available=7_000_000))
    assert free_memory(torch.device("cpu")) == 7_000_000
    (tmp_path / limit).parent.mkdir(exist_ok=True)
    (tmp_path / limit).write_text("3000000\n")
    (tmp_path / used).write_text("2500000\n")
    (tmp_path / limit).with_name("memory.stat").write_text(f"anon 7\n{files} 400000\n")
    assert free_memory(torch.device("cpu")) == 900_000
    (tmp_path / used).write_text("4000000\n")
    assert free_memory(torch.device("cpu")) == 0
    (tmp_path / limit).write_text("max\n")
    assert free_memory(torch.device("cpu")) == 7_000_000


HOLES = """
import sys, torch
from lillama.system.resources import save_memory
held = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
if sys.argv[1] == "saved":
    save_memory()
torch.empty(30 << 20, dtype=torch.uint8).fill_(1)  # glibc takes such pieces from its heap from now on
before = held()
pieces = [torch.ones(10 << 20, dtype=torch.uint8) for _ in range(20)]
last = torch.ones(1 << 16, dtype=torch.uint8)
del pieces
print((held() - before) >> 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory so")
def test_saved_memory_leaves_no_holes_where_glibc_by_itself_does():
    """MB that are left of 200 when a small tensor lies behind them."""
    kept, saved = (
        int(subprocess.run([sys.executable, "-c", HOLES, how], check=True, capture_output=True, text=True).stdout)
        for how in ("kept", "saved")
    )
    assert kept > 150 and saved < 20


def test_the_peak_is_known_where_the_kernel_does_not_tell_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_text

    def without(self: Path, **options: str) -> str:
        return "Name: python\n" if str(self) == "/proc/self/status" else real(self, **options)

    monkeypatch.setattr(Path, "read_text", without)
    assert peak_memory() > 1 << 20

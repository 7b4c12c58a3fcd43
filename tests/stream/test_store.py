import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lillama.errors import ResourceError
from lillama.stream.activations import ActivationPlacement, ActivationStore, PerSequenceTensor
from lillama.system.memory import MemoryBudget

MakePlacement = Callable[[str], ActivationPlacement]
PLACES = ["host", "disk"]


def store(
    placement: ActivationPlacement, place: Any, dtype: torch.dtype = torch.float32, *shape: int
) -> ActivationStore:
    return ActivationStore(shape or (6, 4, 5), dtype, placement, place, "some")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_what_is_written_is_read_back_by_slices_and_by_indices(
    place: str, dtype: torch.dtype, placement: MakePlacement
) -> None:
    values = torch.randn(6, 4, 5).to(dtype)
    kept = store(placement(place), place, dtype)
    for rows in (slice(4, 6), slice(0, 3), slice(3, 4)):
        kept.write(rows, values[rows])
    assert torch.equal(kept.read(slice(0, 6)), values) and torch.equal(kept.read(slice(2, 5)), values[2:5])
    chosen = torch.tensor([5, 0, 3, 3])
    assert torch.equal(kept.read(chosen), values[chosen]) and kept.read(chosen).dtype == dtype


@pytest.mark.parametrize("place", PLACES)
def test_rows_that_were_read_are_the_readers_own(place: str, placement: MakePlacement) -> None:
    kept = store(placement(place), place)
    kept.write(slice(0, 6), torch.ones(6, 4, 5))
    for rows in (slice(0, 2), torch.tensor([0, 1])):
        kept.read(rows).zero_()
    assert kept.read(slice(0, 6)).min() == 1


@pytest.mark.parametrize("place", PLACES)
def test_values_are_written_in_the_stores_type(place: str, placement: MakePlacement) -> None:
    kept = store(placement(place), place, torch.bfloat16)
    values = torch.randn(6, 4, 5, requires_grad=True)
    kept.write(slice(0, 6), values)
    assert torch.equal(kept.read(slice(0, 6)), values.detach().bfloat16())


def test_a_store_on_disk_is_one_file_of_its_full_size_until_it_is_removed(
    placement: MakePlacement, tmp_path: Path
) -> None:
    kept = store(placement("disk"), "disk", torch.bfloat16)
    (file,) = (tmp_path / "scratch").iterdir()
    assert file.stat().st_size == 6 * 4 * 5 * 2 and file.stat().st_blocks > 0
    kept.remove()
    kept.remove()
    assert not file.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_told_when_the_store_is_made(
    number: int, placement: MakePlacement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match=r"no room for 0\.0 GB of activations; .*--run folder, or lower --tokens"):
        store(placement("disk"), "disk")
    assert not list((tmp_path / "scratch").iterdir())


def test_another_trouble_of_the_disk_is_not_called_a_full_one(
    placement: MakePlacement, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "posix_fallocate", broken)
    with pytest.raises(OSError, match="broken"):
        store(placement("disk"), "disk")


@pytest.mark.parametrize(
    ("device", "nbytes", "place"),
    [
        ("cpu", 100, "host"),
        ("cpu", 101, "disk"),
        ("cpu", 10, "host"),
        ("cuda", 50, "device"),
        ("cuda", 51, "host"),
        ("cuda", 101, "disk"),
    ],
)
def test_stores_go_where_they_fit(device: str, nbytes: int, place: str, tmp_path: Path) -> None:
    assert ActivationPlacement(torch.device(device), tmp_path, 50, 100).place(nbytes) == place


def test_a_placement_takes_what_it_is_given_or_a_quarter_of_what_is_free(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert ActivationPlacement.on(cpu, tmp_path, 77) == ActivationPlacement(cpu, tmp_path, 77, 77)
    assert ActivationPlacement.on(cpu, tmp_path, None, MemoryBudget(40, 80)) == ActivationPlacement(
        cpu, tmp_path, 10, 20
    )
    assert ActivationPlacement.on(cpu, tmp_path, None).host_bytes > 10**6


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("differ_from", [0, 1, 4, 6])
def test_a_table_gives_every_sequence_its_own_tensor(place: str, differ_from: int, placement: MakePlacement) -> None:
    rows = torch.ones(6, 2, 3, dtype=torch.bool)
    rows[differ_from:, 1, 1] = False
    if differ_from == 0:
        rows[3, 0, 0] = False
    table = PerSequenceTensor(store(placement(place), place), "table")
    for part in (slice(0, 2), slice(2, 5), slice(5, 6)):
        table.write(part, rows[part])
    for wanted in (slice(0, 6), slice(3, 5), slice(5, 6), torch.tensor([4, 0, 5, 2])):
        assert torch.equal(table.read(wanted), rows[wanted])


def test_equal_tensors_are_held_once(placement: MakePlacement, tmp_path: Path) -> None:
    table = PerSequenceTensor(store(placement("disk"), "disk"), "table")
    for part in (slice(0, 3), slice(3, 6)):
        table.write(part, torch.ones(3, 100, 100))
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["some.activations"]
    assert table.read(slice(1, 5)).shape == (4, 100, 100)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("place", ["device", *PLACES])
def test_rows_arrive_on_a_cuda_device_without_a_wait(place: Any, tmp_path: Path) -> None:
    kept = store(ActivationPlacement(torch.device("cuda"), tmp_path, 1 << 30, 1 << 30), place)
    values = torch.randn(6, 4, 5)
    kept.write(slice(0, 6), values)
    chosen = torch.tensor([5, 0, 3])
    kept.read(chosen)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = kept.read(chosen), kept.read(slice(1, 3))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found[0].cpu(), values[chosen]) and torch.equal(found[1].cpu(), values[1:3])

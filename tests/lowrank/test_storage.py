import subprocess
import sys
from itertools import product

import pytest
import torch

from lillama.lowrank.encode import encode_dense, encode_factors
from lillama.lowrank.pivot import pivot_rows
from lillama.lowrank.storage import Storage

STORAGES = [Storage(form, bits, 16) for form, bits in product(("plain", "pivot"), (None, 8, 6, 5, 4, 3, 2))]
SHAPES = [(24, 40, 7), (40, 24, 7), (24, 40, 24), (40, 24, 24), (33, 18, 1), (16, 16, 16)]


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_counted_is_what_is_stored(storage: Storage, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    out_features, in_features, rank = shape
    torch.manual_seed(0)
    left, right = torch.randn(out_features, rank), torch.randn(rank, in_features)
    rows = pivot_rows(left)[0] if storage.form == "pivot" else None
    tensors = encode_factors(left, right, storage, rows, dtype)
    assert sum(tensor.nbytes for tensor in tensors.values()) == storage.nbytes(*shape, dtype.itemsize)
    if storage.bits is None:
        assert sum(tensor.numel() for tensor in tensors.values()) == storage.numbers(*shape)
    assert storage.numbers(*shape) == Storage(storage.form).numbers(*shape)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("columns", [40, 33])
def test_a_dense_weight_is_stored_in_the_same_bits(storage: Storage, columns: int) -> None:
    assert storage.numbers(24, columns, None) == 24 * columns
    if storage.bits is None:
        assert storage.nbytes(24, columns, None, 2) == 24 * columns * 2
        return
    tensors = encode_dense(torch.randn(24, columns), storage)
    assert sum(tensor.nbytes for tensor in tensors.values()) == storage.nbytes(24, columns, None, 2)
    scales = 24 if storage.bits == 8 else 24 * 3
    assert storage.nbytes(24, columns, None, 2) - 2 * scales <= 24 * (columns * storage.bits / 8 + 1 + storage.bits)


@pytest.mark.parametrize("form", ["plain", "pivot"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9), (1, 5), (30, 2)])
def test_the_largest_rank_is_the_largest(form: str, shape: tuple[int, int]) -> None:
    storage = Storage(form)  # pyright: ignore[reportArgumentType]
    costs = {rank: storage.numbers(*shape, rank) for rank in range(1, min(shape) + 1)}
    for numbers in range(max(costs.values()) + 2):
        affordable = [rank for rank, cost in costs.items() if cost <= numbers]
        assert storage.largest_rank(*shape, numbers) == max(affordable, default=0)


def test_the_pivot_form_spares_the_square_of_the_rank_and_pays_the_order() -> None:
    for out_features, in_features in [(64, 64), (64, 160), (160, 64)]:
        for rank in range(1, min(out_features, in_features)):
            plain, pivot = (Storage(form).numbers(out_features, in_features, rank) for form in ("plain", "pivot"))
            assert plain - pivot == rank**2 - out_features
            assert pivot <= out_features * in_features + out_features
    assert Storage("pivot").numbers(64, 160, 64) == 64 * 160


def test_allocators_need_no_torch_for_it() -> None:
    code = "import sys, lillama.lowrank.storage; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

import pytest
import torch
from torch import Tensor

from lillama.lowrank.encode import encode_factors
from lillama.lowrank.pivot import LARGEST, in_order, pivot_rows, refit, to_pivots
from lillama.lowrank.storage import Storage
from lillama.modeling.linear import build_factorised

SHAPES = [(7, 5, 1), (7, 5, 5), (5, 7, 5), (5, 7, 1), (40, 30, 13), (30, 40, 29), (96, 64, 48), (64, 64, 64)]
KINDS = ["gaussian", "six decades", "dependent", "twice", "alike", "zero"]


def factors(kind: str, out_features: int, in_features: int, rank: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    left, right = torch.randn(out_features, rank), torch.randn(rank, in_features)
    if kind == "six decades":
        left = torch.linalg.qr(left)[0] * torch.logspace(0, -6, rank)
    if kind == "dependent":
        left[:, rank // 2 :] = 0
    if kind == "twice":
        left[:, rank // 2 :] = left[:, : rank - rank // 2].clone()
    if kind == "alike":
        left = left[:1].expand(out_features, rank)
    return (torch.zeros_like(left) if kind == "zero" else left), right


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_but_rounding_is_lost(kind: str, shape: tuple[int, int, int]) -> None:
    left, right = factors(kind, *shape)
    rows, how = pivot_rows(left)
    pivots = to_pivots(left, right, rows)
    weight = left.double() @ right.double()
    rebuilt = torch.cat((pivots.right, pivots.left @ pivots.right))[pivots.order]
    torch.testing.assert_close(rebuilt, weight, rtol=0, atol=1e-12 * max(1.0, weight.abs().max().item()))
    assert how.largest == pytest.approx(pivots.left.abs().max().item() if len(pivots.left) else 0.0, abs=1e-9)
    assert how.largest <= LARGEST and 1 <= how.condition < 10 * shape[0]
    assert sorted(rows.tolist()) == list(range(shape[0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pivots_stay_good_when_the_rows_change_places(kind: str, shape: tuple[int, int, int]) -> None:
    """As they do where the order is absorbed, between the choice of the pivots and their use."""
    left, right = factors(kind, *shape)
    order = torch.randperm(shape[0])
    rows = order.argsort()[pivot_rows(left)[0]]
    pivots = to_pivots(left[order], right, rows)
    weight = left.double() @ right.double()
    rebuilt = torch.cat((pivots.right, pivots.left @ pivots.right))[pivots.order]
    torch.testing.assert_close(rebuilt, weight[order], rtol=0, atol=1e-12 * max(1.0, weight.abs().max().item()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_dependent_rows_can_be_rounded(kind: str, shape: tuple[int, int, int], bits: int) -> None:
    left, right = factors(kind, *shape)
    if shape[1] % 2 or shape[2] % 2:
        left, right = factors(kind, shape[0], shape[1] + shape[1] % 2, shape[2])
    stored = encode_factors(left, right, Storage("pivot", bits=bits), pivot_rows(left)[0], torch.float32)
    assert all(tensor.isfinite().all() for tensor in stored.values() if tensor.is_floating_point())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_computes_the_same_in_fp32(kind: str, shape: tuple[int, int, int], bias: bool) -> None:
    out_features, in_features, rank = shape
    left, right = factors(kind, *shape)
    dense = torch.nn.Linear(in_features, out_features, bias)
    layer = build_factorised(dense, rank, {"form": "pivot"}, ordered=rank < out_features)
    state = encode_factors(left, right, Storage("pivot"), pivot_rows(left)[0], torch.float32)
    layer.load_state_dict(state, strict=False)
    x = torch.randn(3, 2, in_features)
    wanted = torch.nn.functional.linear(x.double(), left.double() @ right.double()) + (dense.bias if bias else 0)
    scale = max(1.0, (left @ right).norm().item()) * in_features**0.5
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), wanted.detach().double(), rtol=0, atol=2e-6 * scale)
    torch.testing.assert_close(layer.dense()(x), layer(x), rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("shape", [(40, 30, 13), (96, 64, 48)], ids=str)
def test_the_drift_of_bf16_is_bounded_by_the_coefficients(shape: tuple[int, int, int]) -> None:
    """With u = 2^-8 for bf16's relative rounding error: |dW| <= ((1 + u)^2 - 1) |C| |P|, at most (2u + u^2) 1.1 r max |P|."""
    left, right = factors("six decades", *shape)
    rows, _ = pivot_rows(left)
    pivots = to_pivots(left, right, rows)
    rounded = pivots.left.bfloat16().double() @ pivots.right.bfloat16().double()
    u = 2.0**-8
    bound = (2 * u + u**2) * pivots.left.abs() @ pivots.right.abs()
    drift = (rounded - pivots.left @ pivots.right).abs()
    assert (drift <= bound + 1e-15).all() and (drift > bound / 1000).any()
    assert bound.max() <= (2 * u + u**2) * LARGEST * shape[2] * pivots.right.abs().max()


def test_poor_pivots_are_swapped() -> None:
    """Rows on which QR with column pivoting is known to be off (Kahan's matrix) end with small coefficients too."""
    size, c = 60, 0.3
    s = (1 - c**2) ** 0.5
    kahan = torch.diag(s ** torch.arange(size).double()) @ (
        torch.eye(size).double() - c * torch.triu(torch.ones(size, size).double(), 1)
    )
    rows, how = pivot_rows(kahan.T[:, :-10].contiguous())
    assert how.largest <= LARGEST and not in_order(rows)


def test_coefficients_fit_rounded_pivots_better_than_the_exact_ones() -> None:
    left, right = factors("gaussian", 40, 30, 13)
    pivots = to_pivots(left, right, pivot_rows(left)[0])
    rounded = pivots.right + 0.05 * torch.randn(pivots.right.shape)
    others = pivots.left @ pivots.right
    error = [(others - coefficients @ rounded).norm() for coefficients in (pivots.left, refit(pivots, rounded))]
    assert error[1] < error[0]
    torch.testing.assert_close(refit(pivots, pivots.right), pivots.left)

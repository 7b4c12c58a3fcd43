"""Theorems of the best low-rank approximation, plain and in the norm that a Gram matrix defines."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lillama.lowrank.factors import (
    Factors,
    scaled_svd,
    spectrum,
    truncated_svd,
    two_sided_svd,
    whitened_svd,
)
from lillama.lowrank.gram import TILE, Gram, gram_size

SHAPES = [(7, 12), (12, 7), (9, 9)]
RANKS = [1, 3, 6]


def weight_and_gram(out: int, width: int, seed: int, samples: int = 100) -> tuple[Tensor, Tensor]:
    """A random weight, and the Gram of correlated inputs of very unequal variance."""
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    scales = torch.logspace(0, -2, width, dtype=torch.float64)
    x = torch.randn(samples, width, **draw) * scales @ torch.randn(width, width, **draw)
    return torch.randn(out, width, **draw), x.T @ x


def product(factors: Factors) -> Tensor:
    return factors.left @ factors.right


def gram_error(difference: Tensor, gram: Tensor) -> float:
    """`||D G^(1/2)||_F^2 = trace(D G D^T)`."""
    return (difference @ gram @ difference.T).trace().item()


def root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", RANKS)
def test_truncated_svd_attains_the_eckart_young_bound(shape: tuple[int, int], rank: int) -> None:
    weight, _ = weight_and_gram(*shape, seed=1)
    bound = torch.linalg.svdvals(weight)[rank:].square().sum()
    factors = truncated_svd(weight, rank)
    assert factors.left.shape == (shape[0], rank) and factors.right.shape == (rank, shape[1])
    torch.testing.assert_close((weight - product(factors)).square().sum(), bound)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", RANKS)
def test_whitened_svd_attains_the_bound_of_the_gram_norm(shape: tuple[int, int], rank: int) -> None:
    weight, gram = weight_and_gram(*shape, seed=2)
    bound = torch.linalg.svdvals(weight @ root(gram))[rank:].square().sum().item()
    found = gram_error(weight - product(whitened_svd(weight, gram, rank, damping=0.0)), gram)
    assert found == pytest.approx(bound, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(2, 10),
    width=st.integers(2, 10),
    samples=st.integers(1, 30),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_whitening_is_at_least_as_good_as_plain_svd(
    out: int, width: int, samples: int, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(out, width)))
    weight, gram = weight_and_gram(out, width, seed, samples)
    whitened = gram_error(weight - product(whitened_svd(weight, gram, rank)), gram)
    plain = gram_error(weight - product(truncated_svd(weight, rank)), gram)
    assert whitened <= plain * (1 + 1e-4) + 2e-6 * gram_error(weight, gram)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["full", "deficient", "zero"])
@pytest.mark.parametrize("damping", [1e-6, 0.0])
def test_full_rank_gives_the_weight_back(shape: tuple[int, int], kind: str, damping: float) -> None:
    weight, gram = weight_and_gram(*shape, seed=3, samples=4 if kind == "deficient" else 100)
    factors = whitened_svd(weight, gram * (kind != "zero"), min(shape), damping)
    torch.testing.assert_close(product(factors), weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(product(truncated_svd(weight, min(shape))), weight)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_gram_of_zeros_gives_plain_svd(shape: tuple[int, int]) -> None:
    weight, gram = weight_and_gram(*shape, seed=4)
    torch.testing.assert_close(product(whitened_svd(weight, 0 * gram, 3)), product(truncated_svd(weight, 3)))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_gram_of_few_samples_is_met_exactly_from_its_rank_on(shape: tuple[int, int]) -> None:
    weight, gram = weight_and_gram(*shape, seed=5, samples=3)
    factors = whitened_svd(weight, gram, 3)
    assert all(tensor.isfinite().all() for tensor in (factors.left, factors.right))
    assert gram_error(weight - product(factors), gram) < 1e-5 * gram_error(weight, gram)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-12, 3.0, 1e15])
def test_the_scale_of_the_gram_does_not_matter(shape: tuple[int, int], scale: float) -> None:
    weight, gram = weight_and_gram(*shape, seed=6)
    torch.testing.assert_close(
        product(whitened_svd(weight, scale * gram, 4)), product(whitened_svd(weight, gram, 4)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_low_precision_weight_is_factorised_in_fp64(shape: tuple[int, int]) -> None:
    weight, gram = weight_and_gram(*shape, seed=7)
    low = weight.bfloat16()
    for factors, wanted in (
        (whitened_svd(low, gram.float(), 4), whitened_svd(low.double(), gram.float().double(), 4)),
        (truncated_svd(low, 4), truncated_svd(low.double(), 4)),
    ):
        assert factors.left.dtype == factors.right.dtype == torch.float64
        torch.testing.assert_close(product(factors), product(wanted))


@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_have_equal_norms_and_come_in_falling_order(shape: tuple[int, int]) -> None:
    weight, gram = weight_and_gram(*shape, seed=8)
    for factors in (whitened_svd(weight, gram, 5), truncated_svd(weight, 5)):
        torch.testing.assert_close(factors.left.norm(dim=0), factors.right.norm(dim=1))
    left, right = truncated_svd(weight, 5).left, truncated_svd(weight, 5).right
    torch.testing.assert_close(left.norm(dim=0) * right.norm(dim=1), torch.linalg.svdvals(weight)[:5])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_smaller_rank_is_the_beginning_of_a_larger_one(shape: tuple[int, int]) -> None:
    weight, gram = weight_and_gram(*shape, seed=9)
    small, large = whitened_svd(weight, gram, 2), whitened_svd(weight, gram, 5)
    torch.testing.assert_close(product(small), large.left[:, :2] @ large.right[:2], rtol=1e-5, atol=1e-6)


def test_a_weight_of_zeros_has_finite_factors() -> None:
    for shape in SHAPES:
        _, gram = weight_and_gram(*shape, seed=1)
        zeros = torch.zeros(shape)
        for factors in (whitened_svd(zeros, gram, 3), truncated_svd(zeros, 3)):
            assert not product(factors).any() and product(factors).isfinite().all()


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99), dtype=st.sampled_from(
    [torch.float64, torch.float32, torch.bfloat16]
))  # fmt: skip
def test_a_gram_in_pieces_is_the_direct_sum_in_any_order(sizes: list[int], seed: int, dtype: torch.dtype) -> None:
    x = torch.randn(sum(sizes), 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    forth, back = Gram.zeros(5, x.device), Gram.zeros(5, x.device)
    for piece in x.split(sizes):
        forth.add(piece)
    for piece in reversed(x.split(sizes)):
        back.add(piece)
    exact = x.double().T @ x.double()
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    assert forth.sum.dtype == torch.float64 and forth.count == len(x)
    for gram in (forth, back):
        torch.testing.assert_close(gram.sum, exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


def test_a_gram_wider_than_a_tile_is_symmetric_and_complete() -> None:
    x = torch.randn(40, 2 * TILE + 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = Gram.zeros(x.shape[1], x.device)
    for piece in x.split(25):
        gram.add(piece)
    torch.testing.assert_close(gram.sum, x.T @ x)
    torch.testing.assert_close(gram.sum, gram.sum.T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram.absolute, x.abs().sum(dim=0))
    assert sum(tile.numel() for tile in gram.tiles) == gram_size(x.shape[1]) < 0.75 * gram.sum.numel()


def test_grams_add_up_and_can_be_of_fewer_vectors() -> None:
    x = torch.randn(60, TILE + 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = (Gram.zeros(x.shape[1], x.device) for _ in range(2))
    first.add(x[:20])
    second.add(x[20:])
    both, third = first + second, (first + second).averaged(20)
    assert (both.count, third.count, both.width) == (60, 20, TILE + 9)
    torch.testing.assert_close(both.sum, x.T @ x)
    torch.testing.assert_close(third.sum, x.T @ x / 3)
    torch.testing.assert_close(third.absolute, x.abs().sum(dim=0) / 3)


def two_sided_error(difference: Tensor, gram_in: Tensor | None, gram_out: Tensor | None) -> float:
    """`||G_out^(1/2) D G_in^(1/2)||_F^2`, by symmetric roots."""
    difference = difference if gram_in is None else difference @ root(gram_in)
    return (difference if gram_out is None else root(gram_out) @ difference).square().sum().item()


GRAMS = ["both", "in", "out", "none"]


def weight_and_grams(shape: tuple[int, int], which: str, seed: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    weight, gram_in = weight_and_gram(*shape, seed)
    _, gram_out = weight_and_gram(1, shape[0], seed + 100)
    return weight, gram_in if which in ("both", "in") else None, gram_out if which in ("both", "out") else None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("which", GRAMS)
def test_two_sided_svd_attains_the_bound_and_the_spectrum_tells_it(
    shape: tuple[int, int], rank: int, which: str
) -> None:
    weight, gram_in, gram_out = weight_and_grams(shape, which, seed=11)
    white = weight if gram_in is None else weight @ root(gram_in)
    bound = torch.linalg.svdvals(white if gram_out is None else root(gram_out) @ white)
    factors = two_sided_svd(weight, gram_in, gram_out, rank, damping=0.0)
    values = spectrum(weight, gram_in, gram_out, damping=0.0)
    assert values.shape == (min(shape),) and (values[:-1] >= values[1:]).all()
    torch.testing.assert_close(values, bound, rtol=1e-5, atol=1e-7 * bound[0].item())
    found = two_sided_error(weight - product(factors), gram_in, gram_out)
    assert found == pytest.approx(bound[rank:].square().sum().item(), rel=1e-5)
    assert found == pytest.approx(values[rank:].square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_identities_reduce_two_sided_to_plain_svd(shape: tuple[int, int]) -> None:
    weight, _ = weight_and_gram(*shape, seed=12)
    plain = product(truncated_svd(weight, 3))
    eye_in, eye_out = 5.0 * torch.eye(shape[1]), 0.1 * torch.eye(shape[0])
    for gram_in, gram_out in ((None, None), (eye_in, None), (None, eye_out), (eye_in, eye_out)):
        torch.testing.assert_close(product(two_sided_svd(weight, gram_in, gram_out, 3)), plain)


@pytest.mark.parametrize("shape", SHAPES)
def test_rank_deficient_grams_on_both_sides_are_met_from_the_smaller_rank_on(shape: tuple[int, int]) -> None:
    weight, gram_in = weight_and_gram(*shape, seed=13, samples=5)
    _, gram_out = weight_and_gram(1, shape[0], seed=14, samples=3)
    factors, values = two_sided_svd(weight, gram_in, gram_out, 3), spectrum(weight, gram_in, gram_out)
    assert all(tensor.isfinite().all() for tensor in (factors.left, factors.right, values))
    whole = two_sided_error(weight, gram_in, gram_out)
    assert two_sided_error(weight - product(factors), gram_in, gram_out) < 1e-4 * whole
    assert values[3:].square().sum() < 1e-4 * whole


@pytest.mark.parametrize("shape", SHAPES)
def test_scaled_svd_attains_the_bound_of_its_norm(shape: tuple[int, int]) -> None:
    weight, _ = weight_and_gram(*shape, seed=15)
    scales = torch.logspace(-1, 2, shape[1], dtype=torch.float64)
    factors = scaled_svd(weight, scales, 3)
    bound = torch.linalg.svdvals(weight * scales)[3:].square().sum()
    torch.testing.assert_close(((weight - product(factors)) * scales).square().sum(), bound)
    torch.testing.assert_close(factors.left.norm(dim=0), factors.right.norm(dim=1))


def test_a_diagonal_gram_is_the_full_one_that_is_zero_beside_it() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((9, 14), (14, 9), (8, 8)):
        weight = torch.randn(shape, generator=generator)
        x = torch.randn(40, shape[1], generator=generator).double()
        gram, scales = x.T @ x, torch.rand(shape[0], generator=generator).double() + 0.1
        by_diagonal = two_sided_svd(weight, gram, scales, 4)
        by_matrix = two_sided_svd(weight, gram, torch.diag(scales), 4)
        torch.testing.assert_close(by_diagonal.left @ by_diagonal.right, by_matrix.left @ by_matrix.right)
        torch.testing.assert_close(spectrum(weight, gram, scales), spectrum(weight, gram, torch.diag(scales)))


@pytest.mark.parametrize("shape", [(20, 2 * TILE + 7), (2 * TILE + 7, 20), (TILE + 3, TILE + 3)])
@pytest.mark.parametrize("widest", [None, 30])
def test_a_gram_serves_as_its_sum_does(shape: tuple[int, int], widest: int | None) -> None:
    """Whole, or its diagonal where it is wider than 30, at either side of the weight."""
    generator = torch.Generator().manual_seed(0)
    weight, grams = torch.randn(shape, generator=generator, dtype=torch.float64), []
    for features in (shape[1], shape[0]):
        grams.append(Gram.zeros(features, torch.device("cpu"), widest))
        grams[-1].add(torch.randn(900, features, generator=generator) * torch.linspace(0.2, 2, features))
        total = grams[-1].sum
        trace, whole = (total.sum(), total.diag()) if total.dim() == 1 else (total.trace(), total)
        assert grams[-1].mean_eigenvalue == pytest.approx(trace.item() / features)
        side = weight if features == shape[1] else weight.T
        torch.testing.assert_close(grams[-1].product(side), side @ whole)
    by_gram = two_sided_svd(weight, *grams, 5, damping=1e-3, damping_out=0.1)
    by_sum = two_sided_svd(weight, *(gram.sum for gram in grams), 5, damping=1e-3, damping_out=0.1)
    torch.testing.assert_close(product(by_gram), product(by_sum))
    torch.testing.assert_close(spectrum(weight, *grams), spectrum(weight, *(gram.sum for gram in grams)))


def test_of_very_long_vectors_only_the_squares_are_summed() -> None:
    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    full, short = Gram.zeros(12, torch.device("cpu"), widest=12), Gram.zeros(12, torch.device("cpu"), widest=11)
    for gram in (full, short):
        gram.add(x[:10])
        gram.add(x[10:])
    torch.testing.assert_close(short.sum, full.sum.diagonal(), rtol=1e-6, atol=1e-5)
    assert gram_size(12, widest=11) == 12 and gram_size(12, widest=12) == 144
    assert gram_size(10**12) < 0.6 * 10**24  # in no time, though there are billions of tiles
    assert torch.equal(short.absolute, full.absolute) and short.count == full.count == 30

"""Few leading eigenvectors found in a Krylov space are as good as those of the whole decomposition, or are not taken."""

import pytest
import torch
from torch import Tensor

from lillama.lowrank import eigen as module
from lillama.lowrank.eigen import krylov, leading
from lillama.lowrank.factors import two_sided_svd

SIDE, RANK = 160, 8
FALLING = {
    "1/i": lambda i: 1 / i,
    "1/sqrt(i)": lambda i: i**-0.5,
    "geometric": lambda i: 0.8**i,
    "equal pairs": lambda i: 1 / ((i + 1) // 2),
}


def matrix_of(singular: Tensor, generator: torch.Generator) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(len(singular), len(singular), generator=generator, dtype=torch.float64))
    return (q * singular.square()) @ q.T


@pytest.mark.parametrize("fall", FALLING)
def test_what_is_found_leaves_almost_the_least_error(fall: str, generator: torch.Generator) -> None:
    singular = FALLING[fall](torch.arange(1, SIDE + 1, dtype=torch.float64))
    matrix = matrix_of(singular, generator)
    found = krylov(matrix, RANK)
    assert found is not None and found.shape == (SIDE, RANK)
    torch.testing.assert_close(found.T @ found, torch.eye(RANK, dtype=torch.float64), atol=1e-12, rtol=0)
    captured = (found * (matrix @ found)).sum(dim=0)
    assert captured.diff().max() < 1e-9
    least = singular[RANK:].square().sum()
    assert matrix.trace() - captured.sum() < least * (1 + 1e-5) + 1e-14
    again = krylov(matrix, RANK)
    assert again is not None and torch.equal(found, again)


@pytest.mark.parametrize("flat", [0.999, 0.998])
def test_where_no_direction_leads_nothing_is_taken(flat: float, generator: torch.Generator) -> None:
    assert krylov(matrix_of(flat ** torch.arange(1, 1001, dtype=torch.float64), generator), RANK) is None


@pytest.mark.parametrize("true_rank", [0, 3, RANK, 30])
def test_of_a_matrix_of_small_rank_all_is_captured(true_rank: int, generator: torch.Generator, monkeypatch) -> None:
    monkeypatch.setattr(module, "SMALLEST", SIDE)
    singular = torch.zeros(SIDE, dtype=torch.float64)
    singular[:true_rank] = torch.linspace(2, 1, true_rank, dtype=torch.float64)
    matrix = matrix_of(singular, generator)
    found = leading(matrix, RANK)
    torch.testing.assert_close(found.T @ found, torch.eye(RANK, dtype=torch.float64), atol=1e-10, rtol=0)
    captured = (found * (matrix @ found)).sum()
    torch.testing.assert_close(captured, singular[:RANK].square().sum(), rtol=1e-5, atol=1e-12)


CROWDED = {
    "a crowd below": torch.cat([torch.linspace(1, 0.9, 80), torch.full((432,), 0.3)]),
    "a slope": 1 - 0.1 * torch.arange(512) / 512,
}


@pytest.mark.parametrize("kind", CROWDED)
def test_where_eigenvalues_crowd_it_is_good_or_not_taken(kind: str, generator: torch.Generator) -> None:
    eigenvalues = CROWDED[kind].double()
    matrix = matrix_of(eigenvalues.sqrt(), generator)
    found = krylov(matrix, RANK)
    if found is not None:
        excess = eigenvalues[:RANK].sum() - (found * (matrix @ found)).sum()
        assert excess < 1e-5 * eigenvalues[RANK:].sum()


def test_of_a_stack_each_is_found_alone(generator: torch.Generator, monkeypatch) -> None:
    monkeypatch.setattr(module, "SMALLEST", SIDE)
    both = torch.stack(
        [matrix_of(FALLING[fall](torch.arange(1, SIDE + 1).double()), generator) for fall in ("1/i", "geometric")]
    )
    for matrix, found in zip(both, leading(both, RANK), strict=True):
        torch.testing.assert_close(found, krylov(matrix, RANK))


def test_it_is_used_where_the_rank_is_far_below_the_side(generator: torch.Generator, monkeypatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(module, "SMALLEST", SIDE)
    monkeypatch.setattr(module, "krylov", lambda matrix, rank: asked.append((len(matrix), rank)))
    for side, rank in ((SIDE, SIDE // 16), (SIDE, SIDE // 16 + 1), (SIDE - 1, 2)):
        matrix = matrix_of(1 / torch.arange(1, side + 1, dtype=torch.float64), generator)
        torch.testing.assert_close(leading(matrix, rank), torch.linalg.eigh(matrix)[1][:, -rank:].flip(1))
    assert asked == [(SIDE, SIDE // 16)]


def test_factors_come_out_the_same(generator: torch.Generator, monkeypatch) -> None:
    scales = torch.logspace(0, -2, SIDE, dtype=torch.float64)
    weight = torch.randn(SIDE, 200, generator=generator, dtype=torch.float64) * scales[:, None]
    x, y = torch.randn(300, 200, generator=generator).double(), torch.randn(300, SIDE, generator=generator).double()
    plain = two_sided_svd(weight, x.T @ x, y.T @ y, RANK)
    monkeypatch.setattr(module, "SMALLEST", SIDE)
    fast = two_sided_svd(weight, x.T @ x, y.T @ y, RANK)
    assert not torch.equal(plain.left, fast.left)
    torch.testing.assert_close(fast.left @ fast.right, plain.left @ plain.right, rtol=0, atol=1e-4)

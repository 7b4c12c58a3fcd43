"""From two factors to pivot rows and coefficients, without loss (PIFA, arXiv 2501.19090). Computed in fp64 on the CPU."""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from scipy import linalg  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

LARGEST = 1.1  # magnitude of a coefficient
DEPENDENT = 1e-12  # of a column's length: what is left of one that depends on others


@dataclass(frozen=True)
class Pivoting:
    """How well the pivot rows of a weight stand for its other rows.

    Attributes:
        condition: of the pivots among the rows of an orthonormal basis of the weight's column space: 1 is best, and
            rounding errors of the pivot rows grow at most so many times on their way to the other rows.
        largest: magnitude of the coefficients, at most 1.1.
    """

    condition: float
    largest: float


@dataclass(frozen=True)
class Pivots:
    """A weight as some of its rows and the coefficients of the others.

    Attributes:
        right: the pivot rows, r x in.
        left: the coefficients, out - r x r: the other rows are `left @ right`.
        order: where each row of the weight stands in `[right; left @ right]`.
    """

    right: Float[Tensor, "rank in"]
    left: Float[Tensor, "others rank"]
    order: Int[Tensor, " out"]


def pivot_rows(left: Float[Tensor, "out rank"]) -> tuple[Int[Tensor, " out"], Pivoting]:
    """Return the rows of a weight `left @ right` with the pivots first, and how good these are.

    The coefficients depend on the column space of `left` alone. Pivots are found by QR with column pivoting on the
    transpose of an orthonormal basis of it; then a pivot is swapped for another row as long as a coefficient is larger
    than 1.1, which makes the volume of the pivots grow each time (Goreinov et al., How to find a good submatrix, 2010).
    Neither small singular values nor zeros of the factors can therefore harm. Where the columns of `left` depend on each
    other, as many pivots as are independent do all of it, and the rest are any rows.

    Args:
        left: the factor; the rank must not be larger than the number of rows.
    """
    out_features, rank = left.shape
    if rank == out_features:
        return torch.arange(rank), Pivoting(1.0, 0.0)
    basis = _basis(left)
    width = basis.shape[1]
    if not width:
        return torch.arange(out_features), Pivoting(1.0, 0.0)
    chosen = cast(Any, linalg).qr(basis.T.numpy(), mode="r", pivoting=True)[1]
    rows = torch.tensor(chosen, dtype=torch.long)
    coefficients = _solve(basis, rows, rank)
    while coefficients.abs().max() > LARGEST:
        other, pivot = divmod(int(coefficients.abs().argmax()), rank)
        rows[pivot], rows[rank + other] = rows[rank + other].clone(), rows[pivot].clone()
        _swap(coefficients, other, pivot)
    condition = cast(Any, torch.linalg).cond(basis[rows[:width]])
    return rows, Pivoting(float(condition), float(coefficients.abs().max()))


def to_pivots(left: Float[Tensor, "out rank"], right: Float[Tensor, "rank in"], rows: Int[Tensor, " out"]) -> Pivots:
    """Return `left @ right` as pivot rows and coefficients in fp64.

    Args:
        left: the one factor.
        right: the other.
        rows: as `pivot_rows` gives; the first r are the pivots.
    """
    rank = left.shape[1]
    pivots = left.detach().double().cpu()[rows[:rank]] @ right.detach().double().cpu()
    return Pivots(pivots, _solve(_basis(left), rows, rank), rows.argsort())


def in_order(rows: Int[Tensor, " out"]) -> bool:
    """Whether rows stand as they are: no order needs to be stored."""
    return bool((rows == torch.arange(len(rows))).all())


def refit(pivots: Pivots, rounded: Float[Tensor, "rank in"]) -> Float64[Tensor, "others rank"]:
    """Return the coefficients of the other rows in pivot rows that have been rounded: those of the least squared error."""
    others = pivots.left @ pivots.right
    fit = cast(Any, torch.linalg).lstsq(rounded.double().cpu().T, others.T)
    return fit.solution.T.contiguous()


def _basis(left: Float[Tensor, "out rank"]) -> Float64[Tensor, "out width"]:
    """Return an orthonormal basis of what the columns of `left` span; it does not depend on the order of the rows."""
    exact = left.detach().double().cpu()
    basis, triangle = cast(Any, torch.linalg).qr(exact)
    lengths = exact.square().sum(dim=0).sqrt()
    if (triangle.diagonal().abs() > DEPENDENT * lengths).all():
        return basis
    columns = exact[:, lengths > 0] / lengths[lengths > 0]
    vectors, values, _ = cast(Any, torch.linalg).svd(columns, full_matrices=False)
    return vectors[:, values > DEPENDENT * values[:1]]


def _solve(basis: Float64[Tensor, "out width"], rows: Int[Tensor, " out"], rank: int) -> Float64[Tensor, "others rank"]:
    """Return the coefficients of the other rows in the pivots, which come first."""
    width = basis.shape[1]
    found = cast(Any, torch.linalg).solve(basis[rows[:width]].T, basis[rows[rank:]].T).T.contiguous()
    return found if width == rank else F.pad(found, (0, rank - width))


def _swap(coefficients: Float64[Tensor, "others rank"], other: int, pivot: int) -> None:
    """Update the coefficients in place after a row that is no pivot and a pivot have changed places."""
    change = coefficients[other].clone()
    size = float(change[pivot])
    change[pivot] -= 1
    coefficients -= torch.outer(coefficients[:, pivot].clone(), change / size)
    coefficients[other] = -change / size
    coefficients[other, pivot] += 1

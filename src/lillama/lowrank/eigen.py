"""The leading eigenvectors of a symmetric positive semi-definite matrix: of all, or of few found by a range finder."""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

SMALLEST = 512  # side of a matrix for which a range finder can be faster
FAR_BELOW = 16  # the rank must be at most this part of the side
EXTRA, DEPTHS = 8, (4, 6, 8)  # columns beyond the rank; products with the matrix after which the residual is looked at
SETTLED = 1e-6  # of the error that is left: by so much it may exceed the least possible, as far as can be told


def leading(matrix: Float[Tensor, "... n n"], rank: int) -> Float[Tensor, "... n rank"]:
    """Return the eigenvectors of the largest eigenvalues, the largest first.

    Where the rank is far below the side, they are looked for in a random Krylov space, and taken if their residual is
    small enough; otherwise the whole matrix is decomposed.

    Args:
        matrix: symmetric, positive semi-definite.
        rank: how many.
    """
    side = matrix.shape[-1]
    if side >= SMALLEST and rank * FAR_BELOW <= side:
        if matrix.dim() > 2:
            return torch.stack([leading(one, rank) for one in matrix])
        found = krylov(matrix, rank)
        if found is not None:
            return found
    return eigh(matrix)[1][..., -rank:].flip(-1)


def krylov(matrix: Float[Tensor, "n n"], rank: int) -> Float[Tensor, "n rank"] | None:
    """Return orthonormal vectors that capture of the matrix almost what the leading eigenvectors do, the largest first.

    A block Krylov space of random vectors (Musco and Musco, arXiv 1504.05477) with the Rayleigh-Ritz procedure. The error left
    exceeds the least possible by what the Ritz values lie below the eigenvalues. Each does so by at most `|r|`, of its
    residual `r = A v - t v`, and by `|r|^2 / gap` (Kato and Temple), where the gap to the first eigenvalue that is not wanted
    is taken from the Ritz value in its place. That no direction was missed is likely, by the random start, but not certain.

    Args:
        matrix: symmetric, positive semi-definite.
        rank: how many.

    Returns:
        the vectors, or None if the residual is still too large.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(matrix), rank + EXTRA, generator=generator, dtype=torch.float64)
    basis = _orthonormal(start.to(matrix.device))
    images, trace = matrix @ basis, matrix.trace()
    for depth in range(1, max(DEPTHS) + 1):
        block = images[:, -start.shape[1] :]
        for _ in range(2):  # the first time leaves rounding errors along the basis
            block = _orthonormal(block - basis @ (basis.T @ block))
        basis, images = torch.cat([basis, block], dim=1), torch.cat([images, matrix @ block], dim=1)
        if depth in DEPTHS:
            values, turns = eigh(basis.T @ images)
            gaps = values[-rank:] - values[-rank - 1]
            values, turns = values[-rank:], turns[:, -rank:]
            vectors = basis @ turns
            squares = (images @ turns - vectors * values).square().sum(dim=0)
            excess = torch.minimum(squares.sqrt(), squares / gaps.clamp(min=torch.finfo(gaps.dtype).tiny)).sum()
            if excess <= SETTLED * (trace - values.sum()):
                return vectors.flip(1)
    return None


def eigh(matrix: Float[Tensor, "... n n"]) -> tuple[Float[Tensor, "... n"], Float[Tensor, "... n n"]]:
    """Return the eigenvalues of a symmetric matrix, the smallest first, and its eigenvectors."""
    result = torch.linalg.eigh(matrix)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return cast(tuple[Tensor, Tensor], result)


def _orthonormal(matrix: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    q, _ = torch.linalg.qr(matrix)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return cast(Tensor, q)

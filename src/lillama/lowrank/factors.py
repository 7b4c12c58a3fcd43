"""Best low-rank approximations of a weight: pure functions on tensors, computed in fp64.

Several weights of one shape may be stacked (`...`), with what is known of them stacked alike.
"""

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from lillama.lowrank.eigen import eigh, leading
from lillama.lowrank.gram import Gram, exact_device

LEAST_DAMPING = 1e-12  # keeps the square root of a rank-deficient Gram invertible


@dataclass(frozen=True)
class Factors:
    """The pair that stands for a weight `W (out x in) ~ left @ right`.

    Attributes:
        left: out x r.
        right: r x in.
    """

    left: Float[Tensor, "... out rank"]
    right: Float[Tensor, "... rank in"]


def truncated_svd(weight: Float[Tensor, "... out in"], rank: int) -> Factors:
    """Return the factors that minimise `||W - left @ right||_F` (Eckart-Young), `sqrt(S)` on both sides.

    Args:
        weight: `W`, of any floating-point type.
        rank: from 1 to min(out, in).
    """
    u, s, vh = _svd(_exact(weight))
    root = s[..., :rank].sqrt()
    return Factors(u[..., :rank] * root[..., None, :], root[..., None] * vh[..., :rank, :])


def scaled_svd(weight: Float[Tensor, "out in"], scales: Float[Tensor, " in"], rank: int) -> Factors:
    """Return the factors that minimise `||(W - left @ right) diag(scales)||_F` (ASVD, arXiv 2312.05821).

    Args:
        weight: `W`, of any floating-point type.
        scales: positive, one for each input.
        rank: from 1 to min(out, in).
    """
    scales = _exact(scales)
    factors = truncated_svd(_exact(weight) * scales, rank)
    return _balance(factors.left, factors.right / scales)


def whitened_svd(
    weight: Float[Tensor, "... out in"], gram: Float[Tensor, "... in in"] | Gram, rank: int, damping: float = 1e-6
) -> Factors:
    """Return the factors that minimise `||(W - left @ right) X||_F`, where `gram = X X^T` (SVD-LLM, arXiv 2403.07378).

    See `two_sided_svd`, of which this is the case without a Gram on the side of the outputs.
    """
    return two_sided_svd(weight, gram, None, rank, damping)


def two_sided_svd(
    weight: Float[Tensor, "... out in"],
    gram_in: Float[Tensor, "... in in"] | Float[Tensor, "... in"] | Gram | None,
    gram_out: Float[Tensor, "... out out"] | Float[Tensor, "... out"] | Gram | None,
    rank: int,
    damping: float = 1e-6,
    damping_out: float | None = None,
) -> Factors:
    """Return the factors that minimise `||A (W - left @ right) B||_F`, where `A^T A = gram_out` and `B B^T = gram_in`.

    For `out <= in` the best product is `A^-1 U U^T A W`, `U` the leading eigenvectors of `A W gram_in W^T A^T`; else the same
    is done to the transpose, so that only matrices of the smaller side are decomposed; of the larger side's Gram only
    products are taken. Nothing is factorised by Cholesky: rank-deficient Grams are fine. Each pair of a column of `left` and
    a row of `right` is scaled to equal norms, as `sqrt(S)` on both sides does without whitening.

    Args:
        weight: `W`, of any floating-point type.
        gram_in: of the inputs; symmetric, positive semi-definite, any scale; or its diagonal, all else being 0. None stands
            for the identity.
        gram_out: of the gradients at the outputs; likewise.
        rank: from 1 to min(out, in).
        damping: this share of a Gram's mean eigenvalue is added to its diagonal, and at least 1e-12 of it.
        damping_out: the same for `gram_out`; None takes `damping`.
    """
    damping_out = damping if damping_out is None else damping_out
    if weight.shape[-2] > weight.shape[-1]:
        turned = two_sided_svd(weight.mT, gram_out, gram_in, rank, damping_out, damping)
        return Factors(turned.right.mT, turned.left.mT)
    w = _exact(weight)
    if gram_out is None:
        left = leading(_output_gram(w, gram_in, damping), rank)
        return _balance(left, left.mT @ w)
    gram_out = _sum(gram_out)
    if gram_out.dim() < w.dim():
        scales = (gram_out + _floor(gram_out, damping_out, diagonal=True)).sqrt()[..., None]
        white = scales * w
        u = leading(_output_gram(white, gram_in, damping), rank)
        return _balance(u / scales, u.mT @ white)
    scales, q = _root(gram_out, damping_out)
    white = scales * (q.mT @ w)
    u = leading(_output_gram(white, gram_in, damping), rank)
    return _balance(q @ (u / scales), u.mT @ white)


def spectrum(
    weight: Float[Tensor, "... out in"],
    gram: Float[Tensor, "... in in"] | Float[Tensor, "... in"] | Gram | None,
    gram_out: Float[Tensor, "... out out"] | Float[Tensor, "... out"] | Gram | None = None,
    damping: float = 1e-6,
) -> Float[Tensor, "... least"]:
    """Return the singular values of `A W B` of `two_sided_svd`, the largest first; there are min(out, in).

    The squares of those after the r-th sum up to the squared error of the outputs on all calibration inputs (weighted by the
    gradients at the outputs) that the best factors of rank r leave.

    Args:
        weight: `W`, of any floating-point type.
        gram: of the inputs; None stands for the identity.
        gram_out: of the gradients at the outputs; likewise.
        damping: as in `two_sided_svd`.

    Examples:
        >>> spectrum(torch.diag(torch.tensor([3.0, 1.0])), gram=None)
        tensor([3., 1.], dtype=torch.float64)
    """
    if weight.shape[-2] > weight.shape[-1]:
        return spectrum(weight.mT, gram_out, gram, damping)
    w = _exact(weight)
    gram_out = None if gram_out is None else _sum(gram_out)
    if gram_out is not None and gram_out.dim() < w.dim():
        w = (gram_out + _floor(gram_out, damping, diagonal=True)).sqrt()[..., None] * w
    elif gram_out is not None:
        scales, q = _root(gram_out, damping)
        w = scales * (q.mT @ w)
    return _eigvalsh(_output_gram(w, gram, damping)).clamp(min=0).sqrt().flip(-1)


def _exact(tensor: Float[Tensor, "..."]) -> Tensor:
    return tensor.detach().to(exact_device(tensor.device), torch.float64)


def _sum(gram: Tensor | Gram) -> Float[Tensor, "... n n"] | Float[Tensor, "... n"]:
    return gram.sum if isinstance(gram, Gram) else _exact(gram)


def _floor(gram: Tensor | Gram, damping: float, diagonal: bool = False) -> Float[Tensor, "... 1"]:
    """Return what damping adds to the diagonal of a Gram; 1 if the Gram is zero."""
    if isinstance(gram, Gram):
        mean = gram.mean_eigenvalue
    else:
        mean = (gram if diagonal else gram.diagonal(dim1=-2, dim2=-1)).mean(dim=-1)
    return torch.where(mean > 0, max(damping, LEAST_DAMPING) * mean, 1.0)[..., None]


def _output_gram(
    w: Float[Tensor, "... out in"], gram: Tensor | Gram | None, damping: float
) -> Float[Tensor, "... out out"]:
    """Return `W G W^T` with the damped Gram `G`, which is not copied."""
    if gram is None:
        return w @ w.mT
    if isinstance(gram, Gram):
        product, floor = gram.product(w), _floor(gram, damping)
    else:
        g = _exact(gram)
        diagonal = g.dim() < w.dim()
        product, floor = w * g[..., None, :] if diagonal else w @ g, _floor(g, damping, diagonal)
    return product.addcmul_(w, floor[..., None]) @ w.mT


def _root(gram: Float[Tensor, "... n n"], damping: float) -> tuple[Float[Tensor, "... n 1"], Float[Tensor, "... n n"]]:
    """Return `s` and `Q` such that the damped Gram is `Q diag(s^2) Q^T`."""
    eigenvalues, q = eigh(gram)
    return (eigenvalues.clamp(min=0) + _floor(gram, damping)).sqrt()[..., None], q


def _svd(matrix: Float[Tensor, "... out in"]) -> tuple[Tensor, Tensor, Tensor]:
    result = torch.linalg.svd(matrix, full_matrices=False)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return cast(tuple[Tensor, Tensor, Tensor], result)


def _eigvalsh(matrix: Float[Tensor, "... n n"]) -> Tensor:
    result = torch.linalg.eigvalsh(matrix)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return cast(Tensor, result)


def _balance(left: Float[Tensor, "... out rank"], right: Float[Tensor, "... rank in"]) -> Factors:
    tiny = torch.finfo(left.dtype).tiny
    left_norms, right_norms = left.square().sum(dim=-2).sqrt(), right.square().sum(dim=-1).sqrt()
    ratio = (right_norms.clamp(min=tiny) / left_norms.clamp(min=tiny)).sqrt()
    return Factors(left * ratio[..., None, :], right / ratio[..., None])
